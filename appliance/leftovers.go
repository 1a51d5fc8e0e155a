package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"

	"kedge/appliance/parameters"
	"kedge/internal/cgroup"
	"kedge/internal/control"
	"kedge/internal/kernelnet"
)

// dataNames has the names that kedge gives to files and folders in its data directory, besides the journal. The list is
// that of docs/architecture.md.
func dataNames() []string {
	return []string{"agent", "bundle", "cni", "containerd", "containerd-damaged-*", "disk-probe", "images", "kedge.json", "kubelet", "log",
		"pod-manifests", "previous", "program", "runtime", "server", "server.before-restore-*", "server.new", "recover.new", "restore.json", ".restore-*",
		control.SnapshotFolder, "upgrade", "witness", ".tmp-*", "kedge.lock"}
}

// runNames has the names in the run directory.
func runNames() []string {
	return []string{"*.sock", "cni", "containerd", "network", "runc", "s", ".tmp-*", "kedge.lock", parameters.FileName}
}

// Leftovers returns what is left on the machine after a removal, and notes about files of the user in kedge's directories. It
// looks only at lists of the kernel and at paths of the journal. The notes say too which kernel parameters stay.
func (r *Removal) Leftovers() (left, notes []string, err error) {
	notes = slices.Clone(r.stay)
	var errs []error
	add := func(what string, found []string, err error) {
		for _, f := range found {
			left = append(left, what+" "+f)
		}
		errs = append(errs, err)
	}
	dirs := []string{r.machine.path(r.journal.RunDir), r.machine.path(r.journal.DataDir)}
	processes, err := processesOf(dirs)
	add("process", processes, err)
	for _, dir := range dirs {
		points, err := mountsBelow(dir)
		add("mount", slices.DeleteFunc(points, func(p string) bool { return p == dir }), err)
	}
	if r.nodeName != "" {
		groups, err := cgroupsOf("kedge-" + r.nodeName)
		add("cgroup", groups, err)
		tables, err := tablesOf("kedge-" + r.nodeName)
		add("nftables table", tables, err)
		links, err := linksOf(r.in.LinkPrefixes(r.nodeName))
		add("network interface", links, err)
	}
	for _, s := range r.steps {
		switch s.do {
		case removeFile:
			if _, err := os.Lstat(r.machine.path(s.path)); !errors.Is(err, fs.ErrNotExist) {
				left = append(left, s.path)
			}
		case removeData:
			names := runNames()
			if s.path == r.journal.DataDir {
				names = dataNames()
			}
			ours, theirs := contents(r.machine.path(s.path), names)
			left = append(left, ours...)
			if len(theirs) > 0 {
				notes = append(notes, fmt.Sprintf("%s stays, with files that are not kedge's: %s", s.path, strings.Join(theirs, ", ")))
			}
		}
	}
	return left, notes, errors.Join(errs...)
}

// contents returns the paths in a directory that match one of the names, and the names of the others.
func contents(dir string, names []string) (ours, theirs []string) {
	entries, _ := os.ReadDir(dir) // it should be gone
	for _, e := range entries {
		if slices.ContainsFunc(names, func(pattern string) bool { ok, _ := filepath.Match(pattern, e.Name()); return ok }) {
			ours = append(ours, filepath.Join(dir, e.Name()))
		} else {
			theirs = append(theirs, e.Name())
		}
	}
	return ours, theirs
}

// processesOf returns processes with a file of the directories in their command line: the shims of containers.
func processesOf(dirs []string) (found []string, err error) {
	ours, err := os.Stat("/")
	if err != nil {
		return nil, err
	}
	all, err := os.ReadDir("/proc")
	for _, p := range all {
		pid, none := strconv.Atoi(p.Name())
		if none != nil || pid == os.Getpid() {
			continue
		}
		line, none := os.ReadFile(filepath.Join("/proc", p.Name(), "cmdline"))
		if none != nil {
			continue // it has ended
		}
		program, _, _ := bytes.Cut(line, []byte{0})
		// In containers and in machines of throwaway clusters the same paths mean something else.
		if root, none := os.Stat(filepath.Join("/proc", p.Name(), "root")); none != nil || !os.SameFile(root, ours) {
			continue
		}
		for _, dir := range dirs {
			if strings.HasPrefix(string(program), dir+"/") {
				found = append(found, fmt.Sprintf("%d (%s)", pid, filepath.Base(string(program))))
			}
		}
	}
	return found, err
}

// cgroupsOf returns the cgroups of a node, by the names that it has with and without systemd.
func cgroupsOf(root string) (found []string, err error) {
	for _, name := range []string{root, cgroup.Slice(root)} {
		for _, pattern := range []string{name, "*/" + name} {
			groups, err := filepath.Glob(filepath.Join("/sys/fs/cgroup", pattern))
			if err != nil {
				return nil, err
			}
			found = append(found, groups...)
		}
	}
	return found, nil
}

// tablesOf returns the nftables tables of a node.
func tablesOf(name string) (found []string, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	tables, err := c.ListTables()
	for _, t := range tables {
		if t.Name == name || strings.HasPrefix(t.Name, name+"/") {
			found = append(found, t.Name)
		}
	}
	return found, err
}

// linksOf returns the network interfaces with names that begin with one of the prefixes.
func linksOf(prefixes []string) (found []string, err error) {
	all, err := kernelnet.List(netlink.LinkList)
	for _, l := range all {
		name := l.Attrs().Name
		for _, prefix := range prefixes {
			if strings.HasPrefix(name, prefix) {
				found = append(found, name)
			}
		}
	}
	return found, err
}
