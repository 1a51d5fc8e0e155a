package harness

import (
	"fmt"
	"slices"
	"sync"
	"testing"
)

var lacks struct {
	sync.Mutex
	list []string
}

// SkipLacking skips the rest of a test because of what this machine does not have. go test
// says nothing of skipped tests when all others pass; the run lists these at its end.
func SkipLacking(t *testing.T, format string, args ...any) {
	t.Helper()
	reason := fmt.Sprintf(format, args...)
	lacks.Lock()
	lacks.list = append(lacks.list, t.Name()+": "+reason)
	lacks.Unlock()
	t.Skip(reason)
}

// reportLacks prints what could not be tested.
func reportLacks() {
	lacks.Lock()
	defer lacks.Unlock()
	slices.Sort(lacks.list)
	for _, l := range lacks.list {
		fmt.Println("SKIP on this machine:", l)
	}
}
