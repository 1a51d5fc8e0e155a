package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cgroupMount = "/sys/fs/cgroup"

// cgroupDirs are the folders of a control group: one, or one in each v1 hierarchy.
func cgroupDirs(name string) ([]string, error) {
	if _, err := os.Stat(filepath.Join(cgroupMount, "cgroup.controllers")); err == nil {
		return []string{filepath.Join(cgroupMount, name)}, nil
	}
	entries, err := os.ReadDir(cgroupMount)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() { // no links such as cpu -> cpu,cpuacct
			out = append(out, filepath.Join(cgroupMount, e.Name(), name))
		}
	}
	return out, nil
}

// makeCgroup makes a top-level group, usable in every hierarchy.
func makeCgroup(name string) error {
	dirs, err := cgroupDirs(name)
	if err != nil {
		return err
	}
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		parent := filepath.Dir(d)
		if controllers, err := os.ReadFile(filepath.Join(parent, "cgroup.controllers")); err == nil {
			for c := range strings.FieldsSeq(string(controllers)) {
				// Some controllers cannot be delegated on some machines.
				_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+c), 0o644)
			}
			continue
		}
		// No process can enter a v1 cpuset without these.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(parent, file))
			if err != nil {
				continue
			}
			if err := os.WriteFile(filepath.Join(d, file), value, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeCgroup ends the processes of a group and of those below it, and removes it.
func removeCgroup(name string) error {
	dirs, err := cgroupDirs(name)
	if err != nil {
		return err
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		var left error
		for _, d := range dirs {
			left = errors.Join(left, removeTree(d))
		}
		if left == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", name, left)
		}
		time.Sleep(50 * time.Millisecond)
	}
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
	for _, pid := range cgroupProcesses(dir) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func cgroupProcesses(dir string) []int {
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var out []int
	for f := range strings.FieldsSeq(string(data)) {
		if pid, err := strconv.Atoi(f); err == nil {
			out = append(out, pid)
		}
	}
	return out
}
