package remote

import (
	"context"
	"os"
	"path/filepath"

	"kedge/appliance"
	"kedge/appliance/release"
)

// Take takes verified executables for the architectures of nodes from a source into the folder dir, which the caller makes and
// removes. A file of the user is for one architecture, and the others have none then. The note says what was not verified.
func Take(ctx context.Context, source appliance.Source, targets []Target, dir string) (files map[string]Files, note string, err error) {
	files = map[string]Files{}
	only := ""
	if source.File != "" {
		if only, err = appliance.Architecture(source.File); err != nil {
			return nil, "", err
		}
	}
	for _, t := range targets {
		if _, taken := files[t.Arch]; taken || only != "" && t.Arch != only {
			continue
		}
		into := filepath.Join(dir, t.Arch)
		if err := os.Mkdir(into, 0o700); err != nil {
			return nil, "", err
		}
		source.Arch = t.Arch
		path, missing, err := source.Take(ctx, into)
		if err != nil {
			return nil, "", err
		}
		note = missing
		if path, err = gather(path, into, t.Arch); err != nil {
			return nil, "", err
		}
		hash, err := appliance.HashFile(path)
		if err != nil {
			return nil, "", err
		}
		files[t.Arch] = Files{Dir: into, Hash: hash}
	}
	return files, note, nil
}

// gather links the user's executable, and the list of its release, into a folder under their names in a release.
func gather(path, into, arch string) (string, error) {
	name := filepath.Join(into, release.Executable(arch))
	if path == name {
		return path, nil
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	for _, f := range []string{release.ListName, release.SignatureName, release.VersionName} {
		if _, err := os.Stat(filepath.Join(filepath.Dir(path), f)); err == nil {
			if err := os.Symlink(filepath.Join(filepath.Dir(path), f), filepath.Join(into, f)); err != nil {
				return "", err
			}
		}
	}
	return name, os.Symlink(path, name)
}
