// Package footprint keeps the process small: it tunes the garbage collector for a
// fast start and then for a long quiet life, gives back the pages of the executable
// that only the start needed, and has one wake-up serve many timers.
//
// It is not for limits on containers. Only package main imports it; its settings
// are of the whole process. docs/performance.md says what each of them gives.
package footprint

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/timerslack"
)

const (
	// bootGC collects more often than Go's default during the start: garbage
	// that is collected late leaves holes between what stays, for good.
	bootGC = 50
	// settledGC trades a little processor time, of which an idle node has
	// plenty, for memory, of which a small machine does not.
	settledGC = 30
	// limitShare is the part of the memory from which on the collector works harder.
	// The rest is for pages of the executable, which the kernel can drop, and for what
	// is not on Go's heap.
	limitShare = 0.7
	// tightShare is the same where memory is tight: there the shims of ten pods and
	// the pages of the executable that are in use need as much as the heap.
	tightShare = 0.45
	// patience is how late the process may be woken for a timer when the start is over.
	// Twice as much saves little more, and this is below what anything that waits for
	// us, a client, a probe, another server, could notice.
	patience = 10 * time.Millisecond
	// readPiece is the most that may be read for one page of instructions.
	readPiece = 16 << 10
	// tight is how much memory, ours or the machine's, is too little to keep the
	// whole executable in beside the heap of the start.
	tight = 512 << 20
)

// Boot prepares for the start. Users' GOGC and GOMEMLIMIT win.
func Boot() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(bootGC)
	}
	memory, known := available()
	if !known {
		return
	}
	share := limitShare
	if memory < tight {
		share = tightShare
		// Else the kernel reads what lies around each page that is needed, has to
		// throw out others for it, and soon does nothing else. Without it we are slow,
		// not wrong.
		_ = eachMapping(readSparingly)
		_ = eachMapping(cut)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(float64(memory) * share))
	}
}

// available is how many bytes of memory we may use: the machine's, or less where a
// control group says so.
func available() (bytes int64, known bool) {
	limit, limited := cgroupLimit("/proc/self/cgroup", "/sys/fs/cgroup")
	var machine unix.Sysinfo_t
	if unix.Sysinfo(&machine) != nil {
		return limit, limited
	}
	total := int64(machine.Totalram) * int64(machine.Unit)
	if limited {
		total = min(total, limit)
	}
	return total, true
}

// Settle is called when the start is over. It takes some ten milliseconds of
// processor time. Each part of it is done whether others fail or not, as the last does
// without CAP_SYS_NICE.
func Settle() error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(settledGC)
	}
	debug.FreeOSMemory()
	return errors.Join(eachMapping(forget), timerslack.Set(patience))
}

// forget has the kernel forget the mapping of clean pages of the executable: it keeps
// their contents in its cache as long as it likes, and maps those that are used again;
// what only initialisation used stops counting as ours.
func forget(m mapping) error {
	return m.advise(unix.MADV_DONTNEED)
}

// readSparingly has the kernel read no more than the page of the executable that is
// missing. For instructions not every kernel takes the advice: see cut.
func readSparingly(m mapping) error {
	return m.advise(unix.MADV_RANDOM)
}

// cut makes pieces of a mapping of instructions. For these newer kernels (seen with Linux
// 6.18) read on as far as the device's read-ahead says, megabytes on some, but never
// beyond the end of the mapping. Every other piece has a flag, that it is left out of core
// dumps, which it is anyhow: without it they would be joined again.
func cut(m mapping) error {
	if !m.instructions {
		return nil
	}
	for begin := m.begin; begin < m.end; begin += 2 * readPiece {
		piece := mapping{begin: begin, end: min(begin+readPiece, m.end)}
		if err := piece.advise(unix.MADV_DONTDUMP); err != nil {
			// vm.max_map_count is reached, and the heap needs mappings too.
			return errors.Join(err, join(m))
		}
	}
	return nil
}

// join undoes cut.
func join(m mapping) error { return m.advise(unix.MADV_DODUMP) }

// mapping is a part of the executable in our memory that nothing can have written to.
type mapping struct {
	begin, end   uintptr
	instructions bool
}

func (m mapping) advise(advice uintptr) error {
	if _, _, errno := unix.Syscall(unix.SYS_MADVISE, m.begin, m.end-m.begin, advice); errno != 0 {
		return fmt.Errorf("advise on pages of the executable: %w", errno)
	}
	return nil
}

// eachMapping calls do with all mappings of the executable until it fails.
func eachMapping(do func(mapping) error) error {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(maps)) {
		if m, ok := readOnlyMapping(line, self); ok {
			if err := do(m); err != nil {
				return err
			}
		}
	}
	return nil
}

// readOnlyMapping parses a line of /proc/self/maps and reports whether it is of
// file and cannot have been written to.
func readOnlyMapping(line, file string) (m mapping, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 6 || fields[5] != file || fields[1] != "r-xp" && fields[1] != "r--p" {
		return mapping{}, false
	}
	from, to, _ := strings.Cut(fields[0], "-")
	b, err1 := strconv.ParseUint(from, 16, 64)
	e, err2 := strconv.ParseUint(to, 16, 64)
	return mapping{uintptr(b), uintptr(e), fields[1] == "r-xp"}, err1 == nil && err2 == nil && e > b
}

// cgroupLimit is the smallest memory limit of the process's control group and its
// parents, in bytes; v1 and v2.
func cgroupLimit(self, root string) (int64, bool) {
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
