package appliance

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/internal/control"
	"kedge/internal/errorkind"
)

// ofSystem are directories that other programs use too. "kedge uninstall" removes names that kedge gives, such as "log", and
// they may be others' there.
var ofSystem = []string{"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/media", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp",
	"/usr", "/usr/local", "/var", "/var/cache", "/var/lib", "/var/log", "/var/run", "/var/tmp"}

// ownDirectories returns an error if the data or the run directory of a new installation is not one of kedge's own.
func (m Machine) ownDirectories(in Install) error {
	for _, d := range []struct {
		setting, path, usual string
		marks                []string // files that kedge's directories have
		names                []string // of kedge, that may be others'
	}{
		{"data-dir", in.DataDir, "/var/lib/kedge", []string{"kedge.json", "program"}, []string{"agent", "cni", "containerd", "kubelet", "log", "runtime", "server", control.SnapshotFolder}},
		{"run-dir", in.RunDir, "/run/kedge", []string{"kedge.lock"}, runNames()},
	} {
		if slices.Contains(ofSystem, d.path) {
			return errorkind.BadSetting(d.setting, " %s is a directory of the system, and kedge needs one of its own, such as %s", d.path, d.usual)
		}
		entries, err := os.ReadDir(m.path(d.path))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if errors.Is(err, unix.ENOTDIR) {
			return errorkind.BadSetting(d.setting, " %s is not a directory", d.path)
		}
		if err != nil {
			return err
		}
		if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return slices.Contains(d.marks, e.Name()) }) {
			continue
		}
		for _, e := range entries {
			if m.holdsAuthorities(filepath.Join(d.path, e.Name())) {
				continue
			}
			if slices.ContainsFunc(d.names, func(pattern string) bool { ok, _ := filepath.Match(pattern, e.Name()); return ok }) {
				return errorkind.BadSetting(d.setting, " %s has %s, which is not kedge's and which \"kedge uninstall\" would remove; give an empty directory, such as %s", d.path, e.Name(), d.usual)
			}
		}
	}
	return nil
}

// holdsAuthorities reports whether a folder of a server that has never started has the authorities that an administrator brings
// (docs/certificates.md), and nothing else.
func (m Machine) holdsAuthorities(dir string) bool {
	if filepath.Base(dir) != "server" {
		return false
	}
	entries, err := os.ReadDir(m.path(dir))
	if err != nil || len(entries) != 1 || entries[0].Name() != "tls" {
		return false
	}
	files, err := os.ReadDir(m.path(filepath.Join(dir, "tls")))
	return err == nil && !slices.ContainsFunc(files, func(e fs.DirEntry) bool {
		name := e.Name()
		return !strings.HasSuffix(name, "-ca.crt") && !strings.HasSuffix(name, "-ca.key")
	})
}

// check returns an error if a journal has not the form of one that kedge has written to a data directory: what it says is
// removed.
func (j *Journal) check(dataDir string) error {
	if j.Role != "server" && j.Role != "agent" {
		return fmt.Errorf("it has the role %q", j.Role)
	}
	if j.DataDir != dataDir {
		return fmt.Errorf("it is of the data directory %q", j.DataDir)
	}
	paths := []string{j.RunDir, j.Config}
	for _, e := range j.Entries {
		if e.Kind != ServiceEntry {
			paths = append(paths, e.Path)
		}
	}
	for _, p := range paths {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p {
			return fmt.Errorf("it has the path %q", p)
		}
	}
	return nil
}
