package footprint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
)

func TestReadOnlyMapping(t *testing.T) {
	for line, want := range map[string]bool{
		"00400000-05000000 r-xp 00000000 fe:00 123  /bin/kedge": true,
		"05000000-07000000 r--p 04c00000 fe:00 123  /bin/kedge": true,
		"07000000-07100000 rw-p 06c00000 fe:00 123  /bin/kedge": false,
		"05000000-07000000 r--p 04c00000 fe:00 123  /bin/other": false,
		"7f0000000000-7f0000001000 r--p 00000000 00:00 0":       false,
		"rubbish": false,
	} {
		m, ok := readOnlyMapping(line, "/bin/kedge")
		if ok != want || ok && (m.begin == 0 || m.end <= m.begin || m.instructions != strings.Contains(line, "r-x")) {
			t.Errorf("%q: %+v %v", line, m, ok)
		}
	}
}

// The kernel must neither join the pieces nor leave one that is longer.
func TestCut(t *testing.T) {
	pieces := func() (n int, longest uintptr) {
		err := eachMapping(func(m mapping) error {
			if m.instructions {
				n, longest = n+1, max(longest, m.end-m.begin)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return n, longest
	}
	before, whole := pieces()
	if err := eachMapping(cut); err != nil {
		t.Fatal(err)
	}
	if n, longest := pieces(); whole <= readPiece || n <= before || longest > readPiece {
		t.Errorf("%d mappings of instructions, the longest of %d bytes, became %d, the longest of %d", before, whole, n, longest)
	}
	if err := eachMapping(join); err != nil {
		t.Fatal(err)
	}
	if n, longest := pieces(); n != before || longest != whole {
		t.Errorf("joined again there are %d mappings, the longest of %d bytes", n, longest)
	}
}

// The process must go on working after its pages were dropped, and be smaller.
func TestSettle(t *testing.T) {
	before := residentFile(t)
	if err := Settle(); err != nil && !errors.Is(err, fs.ErrPermission) { // which its last part may lack
		t.Fatal(err)
	}
	if after := residentFile(t); after >= before {
		t.Errorf("resident pages of files: %d before, %d after", before, after)
	}
}

func residentFile(t *testing.T) (pages int64) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var size, resident, shared int64
	if _, err := fmt.Sscan(string(data), &size, &resident, &shared); err != nil {
		t.Fatal(err)
	}
	return shared
}

// Whatever the load, the pace does not swing: what made it busy keeps it busy, unless the
// load becomes a good deal less.
func TestPace(t *testing.T) {
	// At a percentage p, a program that makes garbage at a rate r (in live heaps a
	// second) has r/(p/100) collections a second.
	run := func(rate float64, percent int) (changes, last int) {
		for range 20 {
			period := settledPeriod
			if percent == busyGC {
				period = busyPeriod
			}
			next, _ := pace(percent, uint64(rate*100/float64(percent)*period.Seconds()))
			if next != percent {
				changes++
			}
			percent = next
		}
		return changes, percent
	}
	for rate := 0.01; rate < 10; rate *= 1.1 {
		for _, begin := range []int{settledGC, busyGC} {
			changes, last := run(rate, begin)
			if changes > 1 {
				t.Errorf("at a rate of %.2f from %d it changes %d times", rate, begin, changes)
			}
			if rate < 0.1 && last != settledGC || rate > 1 && last != busyGC {
				t.Errorf("at a rate of %.2f from %d it ends at %d", rate, begin, last)
			}
		}
	}
}
