package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"kedge/appliance/release"
)

// make writes the release into a folder named after the version, and what belongs beside it: the channels, and install.sh.
func (b *build) make(trusted []release.Key) error {
	script, err := os.ReadFile(b.script())
	if err != nil {
		return err
	}
	if b.secret == nil {
		script = withKey(script, "")
	} else if err := trustSecret(*b.secret, trusted, script); err != nil {
		return err
	}
	dir := filepath.Join(b.out, b.version)
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755), os.MkdirAll(filepath.Join(b.out, "channels"), 0o755)); err != nil {
		return err
	}
	files := map[string][]byte{"install.sh": script, release.VersionName: []byte(b.version + "\n")}
	for _, arch := range b.arches {
		if files[release.Executable(arch)], err = os.ReadFile(b.launcher(arch)); err != nil {
			return err
		}
	}
	modules, err := b.modules()
	if err != nil {
		return err
	}
	if files["sbom.cdx.json"], err = b.bom(modules); err != nil {
		return err
	}
	if files["LICENCES.md"], err = b.licences(modules); err != nil {
		return err
	}
	if err := b.list(dir, files); err != nil {
		return err
	}
	for _, channel := range channels(b.version) {
		if err := os.WriteFile(filepath.Join(b.out, "channels", channel), []byte(b.version+"\n"), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(b.out, "install.sh"), script, 0o755)
}

// list writes the files, the list, and the signature, and verifies the folder as its users do.
func (b *build) list(dir string, files map[string][]byte) error {
	var l release.List
	for name, content := range files {
		if err := l.Add(name, strings.NewReader(string(content))); err != nil {
			return err
		}
		mode := os.FileMode(0o644)
		if strings.HasPrefix(name, "kedge-") || name == "install.sh" {
			mode = 0o755
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, mode); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, release.ListName), l.Text(), 0o644); err != nil {
		return err
	}
	if b.secret == nil {
		fmt.Printf("%s is NOT SIGNED: install.sh checks hashes only\n", dir)
		return nil
	}
	signature, err := sign(l.Text(), *b.secret, b.version)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, release.SignatureName), signature, 0o644); err != nil {
		return err
	}
	found, err := release.VerifyFolder(dir, []release.Key{b.secret.Public().(release.Key)})
	if err != nil || len(found.Absent) > 0 {
		return errors.Join(fmt.Errorf("the release that was made is not right: %v are absent", found.Absent), err)
	}
	fmt.Printf("%s is signed with key %s\n", dir, b.secret.Public())
	return nil
}

// script returns the path of install.sh in the source.
func (b *build) script() string { return filepath.Join(b.root, "scripts/install.sh") }

// launcher returns the path of the executable for an architecture, as make build names it.
func (b *build) launcher(arch string) string {
	name := "bin/kedge"
	if arch != b.host {
		name += "-" + arch
	}
	return filepath.Join(b.root, name)
}

// programs returns the paths of the Go programs in the executable for an architecture, as make build leaves them.
func (b *build) programs(arch string) []string {
	at := func(name string) string { return filepath.Join(b.root, "build", name) }
	return []string{b.launcher(arch), at("program/" + arch + "/kedge"), at("payload/" + arch + "/containerd-shim-runc-v2"), at("payload/" + arch + "/runc")}
}
