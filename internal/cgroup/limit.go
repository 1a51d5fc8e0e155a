package cgroup

import (
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// MemoryLimit returns the smallest memory limit of a process's control group and its parents
// in bytes, in versions 1 and 2, and false if there is none. self is the process's
// /proc/PID/cgroup, and root the mount point of control groups.
func MemoryLimit(self, root string) (int64, bool) {
	data, err := os.ReadFile(self)
	if err != nil {
		return 0, false
	}
	smallest := int64(math.MaxInt64)
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		base, file := root, "memory.max"
		switch {
		case parts[1] == "memory":
			base, file = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		case parts[1] != "":
			continue
		}
		for dir := filepath.Clean("/" + parts[2]); ; dir = filepath.Dir(dir) {
			if v, err := os.ReadFile(filepath.Join(base, dir, file)); err == nil {
				// "max" does not parse; v1 has a number near 2^63 for it.
				if n, err := strconv.ParseInt(strings.TrimSpace(string(v)), 10, 64); err == nil && n > 0 {
					smallest = min(smallest, n)
				}
			}
			if dir == "/" {
				break
			}
		}
	}
	return smallest, smallest < 1<<60
}
