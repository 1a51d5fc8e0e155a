package harness

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// OnlyMeasures skips a test that measures, and fails only when something does not work, unless it is asked for. It logs the load of
// the machine, without which its figures say nothing.
func OnlyMeasures(t *testing.T, target string) {
	t.Helper()
	if os.Getenv("KEDGE_BENCH") == "" {
		t.Skip("takes minutes and measures only: " + target)
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("load of the machine at the beginning: %s", strings.Join(strings.Fields(string(load))[:3], " "))
}

// Figures are the least, the median, the 99th percentile and the largest.
func Figures(d []time.Duration) string {
	d = slices.Sorted(slices.Values(d))
	at := func(p int) time.Duration { return d[min(len(d)-1, len(d)*p/100)].Round(time.Millisecond) }
	return fmt.Sprintf("least %s, p50 %s, p99 %s, most %s (%d times)", at(0), at(50), at(99), at(100), len(d))
}
