// Package cgroup makes and removes the control group below which a node's pods
// are, in cgroup v1, hybrid and v2.
//
// It is not for the groups of pods and containers: kubelet and runc make those.
// Only package agent imports it.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// mountPoint is where every distribution mounts control groups.
const mountPoint = "/sys/fs/cgroup"

// Unified reports whether the machine uses cgroup v2 only.
func Unified() bool {
	var st unix.Statfs_t
	return unix.Statfs(mountPoint, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// Ensure makes the cgroup below which the pods are, in every
// hierarchy, with all controllers that its parent can delegate. root begins
// with a slash.
func Ensure(root string) error {
	if Unified() {
		return ensureUnified(root)
	}
	hierarchies, err := os.ReadDir(mountPoint)
	if err != nil {
		return fmt.Errorf("make cgroup %s: %w", root, err)
	}
	for _, h := range hierarchies {
		if !h.IsDir() { // links such as cpu -> cpu,cpuacct
			continue
		}
		if err := os.MkdirAll(filepath.Join(mountPoint, h.Name(), root), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup %s of %s: %w", root, h.Name(), err)
		}
	}
	return inheritCpuset(root)
}

// inheritCpuset fills cpuset.cpus and cpuset.mems of a new v1 cgroup, without
// which no process can enter it.
func inheritCpuset(root string) error {
	base := filepath.Join(mountPoint, "cpuset")
	dir := base
	for part := range strings.SplitSeq(strings.Trim(root, "/"), "/") {
		parent := dir
		dir = filepath.Join(dir, part)
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			now, err := os.ReadFile(filepath.Join(dir, file))
			if errors.Is(err, fs.ErrNotExist) {
				return nil // the hierarchy is not mounted
			}
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(now)) != "" {
				continue
			}
			inherited, err := os.ReadFile(filepath.Join(parent, file))
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(dir, file), inherited, 0o644); err != nil {
				return fmt.Errorf("set %s of cgroup %s: %w", file, root, err)
			}
		}
	}
	return nil
}

// ensureUnified makes root below the v2 mount and delegates controllers to it
// one level after the other.
func ensureUnified(root string) error {
	dir := mountPoint
	for part := range strings.SplitSeq(strings.Trim(root, "/"), "/") {
		if err := delegate(dir); err != nil {
			return err
		}
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup %s: %w", root, err)
		}
	}
	return delegate(dir)
}

// delegate enables for dir's children every controller that dir has.
func delegate(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("read the controllers of cgroup %s: %w", dir, err)
	}
	for c := range strings.FieldsSeq(string(have)) {
		// One at a time: a controller that cannot be delegated (rdma, misc in
		// some containers) must not keep the others back. The kubelet says
		// which of those it needs are missing.
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644); errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("delegate controller %s in cgroup %s: %w: processes live in it; start kedge in a cgroup of its own", c, dir, err)
		}
	}
	return nil
}

// Remove removes what Ensure made, from the leaves up. It
// fails while a process is left in it.
func Remove(root string) error {
	bases := []string{mountPoint}
	if !Unified() {
		entries, err := os.ReadDir(mountPoint)
		if err != nil {
			return err
		}
		bases = bases[:0]
		for _, e := range entries {
			if e.IsDir() {
				bases = append(bases, filepath.Join(mountPoint, e.Name()))
			}
		}
	}
	var errs []error
	for _, b := range bases {
		errs = append(errs, removeTree(filepath.Join(b, root)))
	}
	return errors.Join(errs...)
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	return nil
}
