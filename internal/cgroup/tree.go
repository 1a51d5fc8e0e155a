package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// EnsureGroup is Ensure for a control group with processes: the unified hierarchy allows these
// only in groups that delegate no controllers.
func EnsureGroup(root string) error {
	if !Unified() {
		return Ensure(root)
	}
	if err := ensureUnified(filepath.Dir(root)); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(mountPoint, root), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make cgroup %s: %w", root, err)
	}
	return nil
}

// Dirs returns the folders of a control group, one for each hierarchy that has it.
func Dirs(root string) ([]string, error) {
	all, err := groupsOf(root)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, dir := range all {
		if _, err := os.Stat(dir); err == nil {
			dirs = append(dirs, dir)
		}
	}
	return dirs, nil
}

// Processes returns the processes in the control group itself, without those below it.
func Processes(root string) ([]int, error) {
	dir := mountPoint
	if !Unified() {
		dir = filepath.Join(mountPoint, "memory")
	}
	text, err := os.ReadFile(filepath.Join(dir, root, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the processes of cgroup %s: %w", root, err)
	}
	var pids []int
	for field := range strings.FieldsSeq(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// freezeAgain is the number of checks, ten milliseconds apart, after which a control group of version 1 is frozen anew.
const freezeAgain = 20

// Freeze freezes or thaws every process in the control group and below it, and returns when
// that is done.
func Freeze(root string, frozen bool) error {
	file, value, state := filepath.Join(mountPoint, "freezer", root, "freezer.state"), "THAWED", "THAWED"
	if frozen {
		value, state = "FROZEN", "FROZEN"
	}
	reads := file
	if Unified() {
		file, value, state = filepath.Join(mountPoint, root, "cgroup.freeze"), "0", "frozen 0"
		if frozen {
			value, state = "1", "frozen 1"
		}
		reads = filepath.Join(mountPoint, root, "cgroup.events")
	}
	if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
		return fmt.Errorf("freeze cgroup %s: %w", root, err)
	}
	deadline := time.Now().Add(endLimit)
	for try := 1; ; try++ {
		text, err := os.ReadFile(reads)
		if err != nil {
			return fmt.Errorf("freeze cgroup %s: %w", root, err)
		}
		if strings.Contains(string(text), state) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("cgroup %s does not become %s", root, state)
		}
		time.Sleep(10 * time.Millisecond)
		// Version 1 can stay on the way for good when a process forks at the wrong moment, and asks for another attempt
		// (Linux, Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst).
		if frozen && !Unified() && try%freezeAgain == 0 {
			for _, again := range []string{"THAWED", value} {
				if err := os.WriteFile(file, []byte(again), 0o644); err != nil {
					return fmt.Errorf("freeze cgroup %s: %w", root, err)
				}
			}
		}
	}
}

// Clear ends every process in the control group and below it, also frozen processes and those
// that enter it meanwhile, and removes the group. A missing group is not an error.
func Clear(root string) error {
	if err := thaw(root); err != nil {
		return err
	}
	for deadline := time.Now().Add(endLimit); ; time.Sleep(10 * time.Millisecond) {
		err := End(root)
		if err == nil {
			if err = Remove(root); err == nil {
				return nil
			}
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// thaw thaws everything in the tree: in v1 a frozen process cannot even die.
func thaw(root string) error {
	if Unified() {
		return nil
	}
	return filepath.WalkDir(filepath.Join(mountPoint, "freezer", root), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "freezer.state" {
			err = os.WriteFile(path, []byte("THAWED"), 0o644)
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil
		}
		return err
	})
}
