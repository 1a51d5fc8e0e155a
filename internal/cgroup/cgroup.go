// Package cgroup makes and removes control groups in cgroup v1, hybrid and v2: the parent of a
// node's pods, and those of simulated machines.
//
// It is not for the groups of pods and containers, which kubelet and runc make. Packages
// agent, throwaway/machine and below internal import it, and the benchmarks.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mountPoint is where every distribution mounts control groups.
const mountPoint = "/sys/fs/cgroup"

// Unified reports whether the machine uses cgroup v2 only.
func Unified() bool {
	var st unix.Statfs_t
	return unix.Statfs(mountPoint, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// Ensure makes the parent cgroup of the pods in every hierarchy, with all controllers that its
// own parent can delegate. root begins with a slash.
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
		// One at a time: a controller that cannot be delegated (rdma, misc in some
		// containers) must not prevent the others. The kubelet reports which of the
		// controllers that it needs are missing.
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644); errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("delegate controller %s in cgroup %s: %w: processes live in it; start kedge in a cgroup of its own", c, dir, err)
		}
	}
	return nil
}

// Remove removes the cgroup that Ensure made, from the leaves up. It fails while a process is
// left in it: see [End].
func Remove(root string) error {
	groups, err := groupsOf(root)
	errs := []error{err}
	for _, g := range groups {
		errs = append(errs, removeTree(g))
	}
	return errors.Join(errs...)
}

// errWholeMachine is the error for the groups that have the processes of the whole machine. An empty name, which a caller may have
// by mistake, means them too.
var errWholeMachine = errors.New("the root cgroup has the processes of the whole machine, and belongs to no node")

// groupsOf returns the paths of root in each hierarchy.
func groupsOf(root string) ([]string, error) {
	if filepath.Clean("/"+root) == "/" {
		return nil, errWholeMachine
	}
	if Unified() {
		return []string{filepath.Join(mountPoint, root)}, nil
	}
	entries, err := os.ReadDir(mountPoint)
	if err != nil {
		return nil, err
	}
	var groups []string
	for _, e := range entries {
		if e.IsDir() {
			groups = append(groups, filepath.Join(mountPoint, e.Name(), root))
		}
	}
	return groups, nil
}

// endLimit bounds the time until killed processes are gone.
const endLimit = 10 * time.Second

// End kills every process in the control group and below it, and returns when they are gone.
// All of them belong to containers, also to containers without a record.
func End(root string) error {
	groups, err := groupsOf(root)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(endLimit)
	for {
		left := 0
		for _, g := range groups {
			n, err := kill(g)
			if err != nil {
				return fmt.Errorf("end the processes in %s: %w", g, err)
			}
			left += n
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes in cgroup %s do not end", left, root)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// kill kills the processes in dir and below, and returns their number.
func kill(dir string) (int, error) {
	// cgroup.kill of version 2 misses no process and hits no other.
	err := os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	byKernel := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EOPNOTSUPP) {
		return 0, err
	}
	count := 0
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || d.Name() != "cgroup.procs" {
			return err
		}
		pids, err := processesIn(path)
		if err != nil {
			return err
		}
		count += len(pids)
		for _, pid := range pids {
			if byKernel {
				break
			}
			if err := killMember(path, pid); err != nil {
				return err
			}
		}
		return nil
	})
	return count, err
}

// processesIn reads a file cgroup.procs.
func processesIn(path string) ([]int, error) {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return nil, err
	}
	var pids []int
	for field := range strings.FieldsSeq(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil && pid != 0 { // 0 is of another pid namespace
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// killMember kills a process from the file cgroup.procs. Its number may belong to another
// process by now, so the process is held by a pidfd and then looked up in the file again.
func killMember(procs string, pid int) error {
	handle, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open process %d: %w", pid, err)
	}
	defer unix.Close(handle)
	still, err := processesIn(procs)
	if err != nil || !slices.Contains(still, pid) {
		return err
	}
	if err := unix.PidfdSendSignal(handle, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
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
