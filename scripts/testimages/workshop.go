package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"kedge/internal/test/image"
)

// workshop has the sources of the images' parts.
type workshop struct {
	programs string // folder of built programs
	debs     string // folder of downloaded packages
}

func (w workshop) program(name string) (image.File, error) {
	data, err := os.ReadFile(filepath.Join(w.programs, name))
	return image.File{Data: data, Mode: 0o755}, err
}

// source returns a file of test/images in the Kubernetes module.
func (w workshop) source(name string) (image.File, error) {
	module, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes").Output()
	if err != nil {
		return image.File{}, fmt.Errorf("find the Kubernetes module: %w", err)
	}
	data, err := os.ReadFile(filepath.Join(strings.TrimSpace(string(module)), "test", "images", filepath.FromSlash(name)))
	return image.File{Data: data}, err
}

// unneeded are folders of packages that no test uses.
var unneeded = []string{"/usr/share/doc/", "/usr/share/man/", "/usr/share/locale/", "/usr/share/info/", "/usr/share/bash-completion/", "/usr/share/lintian/"}

// alternatives are links that installing a package would have created.
var alternatives = map[string]string{
	"/usr/bin/nc":  "/usr/bin/nc.openbsd",
	"/usr/bin/awk": "/usr/bin/mawk",
}

// packages returns the files of Debian packages and their dependencies. Nothing is installed, and no script of
// a package runs.
func (w workshop) packages(names ...string) (map[string]image.File, error) {
	dir, err := w.download(names)
	if err != nil {
		return nil, err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil {
		return nil, err
	}
	files := map[string]image.File{
		"/bin/sh": {Link: "bash"},
		// These are the files that base-passwd's script would write.
		"/etc/passwd": {Data: []byte("root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n")},
		"/etc/group":  {Data: []byte("root:x:0:\nnogroup:x:65534:\n")},
	}
	for _, deb := range debs {
		if err := unpack(deb, files); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
		}
	}
	files = merged(files)
	for name, target := range alternatives {
		if _, ok := files[target]; ok {
			files[name] = image.File{Link: path.Base(target)}
		}
	}
	return files, nil
}

// download fetches the packages and their dependencies into a folder of their own, once. With an empty list of
// installed packages apt downloads all dependencies.
func (w workshop) download(names []string) (string, error) {
	dir, err := filepath.Abs(filepath.Join(w.debs, strings.Join(names, "+")))
	if err != nil {
		return "", err
	}
	done := filepath.Join(dir, "complete")
	if _, err := os.Stat(done); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Join(dir, "partial"), 0o755); err != nil {
		return "", err
	}
	status := filepath.Join(dir, "status")
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return "", err
	}
	args := append([]string{"-qq", "-y", "--no-install-recommends", "--download-only",
		"-o", "Dir::State::status=" + status, "-o", "Dir::Cache::archives=" + dir, "-o", "Debug::NoLocking=1", "install"}, names...)
	if out, err := exec.Command("apt-get", args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("download Debian packages (try apt-get update): %w: %s", err, out)
	}
	return dir, os.WriteFile(done, nil, 0o644)
}

// unpack adds the files of a package.
func unpack(deb string, files map[string]image.File) error {
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", deb)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = readTar(pipe, files)
	_, drained := io.Copy(io.Discard, pipe)
	return errors.Join(err, drained, cmd.Wait())
}

func readTar(r io.Reader, files map[string]image.File) error {
	archive := tar.NewReader(r)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := path.Join("/", h.Name)
		if slices.ContainsFunc(unneeded, func(dir string) bool { return strings.HasPrefix(name, dir) }) {
			continue
		}
		switch h.Typeflag {
		case tar.TypeReg:
			data, err := io.ReadAll(archive)
			if err != nil {
				return err
			}
			files[name] = image.File{Data: data, Mode: h.FileInfo().Mode()}
		case tar.TypeSymlink:
			files[name] = image.File{Link: h.Linkname}
		case tar.TypeLink:
			files[name] = files[path.Join("/", h.Linkname)]
		}
	}
}

// merged moves the files that packages put into /bin, /lib and so on below /usr, where these names are links on
// Debian.
func merged(files map[string]image.File) map[string]image.File {
	out := map[string]image.File{}
	links := []string{"/bin", "/sbin", "/lib", "/lib64"}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		target := name
		for _, dir := range links {
			if strings.HasPrefix(name, dir+"/") {
				target = "/usr" + name
			}
		}
		if f, ok := out[target]; !ok || f.Link != "" {
			out[target] = files[name]
		}
	}
	for _, dir := range links {
		out[dir] = image.File{Link: "usr" + dir}
	}
	return out
}
