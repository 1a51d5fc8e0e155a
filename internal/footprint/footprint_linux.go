// Package footprint keeps the process small: it tunes the garbage collector for a
// fast start and then for a long quiet life, gives back the pages of the executable
// that only the start needed, and lets one wake-up serve many timers.
//
// It sets no limits of containers: its settings are of the whole process. Only main packages
// import it: kedge's, and the shim's for the timer slack. docs/performance.md says what each
// setting gives.
package footprint

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/cgroup"
)

const (
	// bootGC collects more often than Go's default during the start: garbage that is
	// collected late leaves permanent holes between the remaining objects.
	bootGC = 50
	// settledGC trades a little processor time, of which an idle node has plenty, for
	// memory, of which a small machine has little.
	settledGC = 30
	// limitShare is the share of the memory for Go's memory limit. The rest is for pages
	// of the executable, which the kernel can drop, and for memory outside of Go's heap.
	limitShare = 0.7
	// tightShare is the same share where memory is tight: there the shims of ten pods and
	// the used pages of the executable need as much as the heap.
	tightShare = 0.45
	// patience is the timer slack after the start. Twice as much would save little more,
	// and clients, probes and other servers cannot notice this much.
	patience = 10 * time.Millisecond
	// readPiece bounds the read-ahead for a page of instructions.
	readPiece = 16 << 10
	// tight is the memory, of the process or the machine, below which there is no room for
	// the whole executable beside the heap of the start.
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
		// Otherwise the kernel reads the surroundings of each page that is needed, evicts
		// other pages for them, and soon does nothing else. Errors are ignored: the start
		// is only slower then.
		_ = eachMapping(readSparingly)
		_ = eachMapping(cut)
	}
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(int64(float64(memory) * share))
	}
}

// available returns the bytes of memory that the process may use: the machine's, or the lower
// limit of a control group.
func available() (bytes int64, known bool) {
	limit, limited := cgroup.MemoryLimit("/proc/self/cgroup", "/sys/fs/cgroup")
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

// Settle must be called when the start is over. It takes some ten milliseconds of processor
// time. A failure of one part does not prevent the others; the last part fails without
// CAP_SYS_NICE.
func Settle() error {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(settledGC)
	}
	debug.FreeOSMemory()
	return errors.Join(eachMapping(forget), SetTimerSlack(patience))
}

// forget makes the kernel drop the mapping of clean pages of the executable. Their content stays
// in the page cache, and used pages are mapped again; pages that only the initialisation used
// do not count for the process any more.
func forget(m mapping) error {
	return m.advise(unix.MADV_DONTNEED)
}

// readSparingly makes the kernel read only the missing page of the executable. Not every kernel
// follows the advice for instructions: see cut.
func readSparingly(m mapping) error {
	return m.advise(unix.MADV_RANDOM)
}

// cut splits a mapping of instructions into pieces. Newer kernels (seen with Linux 6.18) read
// ahead in such mappings as far as the device's setting says, megabytes on some, but never
// beyond the end of the mapping. Every other piece is marked to be left out of core dumps, which
// instructions are anyhow: without a difference the kernel would join the pieces again.
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

// mapping is a read-only mapping of the executable.
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

// eachMapping calls do for all mappings of the executable until one fails.
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

// readOnlyMapping parses a line of /proc/self/maps and reports whether it is a read-only mapping
// of file.
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
