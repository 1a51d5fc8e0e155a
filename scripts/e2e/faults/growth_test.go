package faults

import (
	"os"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestGrowth: one server becomes three, five, three and one again under load, and after
// each step one is killed and started again.
func TestGrowth(t *testing.T) {
	if os.Getenv("KEDGE_TEST_LONG") == "" {
		t.Skip("five servers at once: set KEDGE_TEST_LONG=1")
	}
	f := &faults{Fleet: harness.NewFleet(t)}
	f.all = []*harness.Node{f.Node}
	ns := f.Namespace(t)
	h := harness.RecordHistory(t, ns, f.Node)
	step := func(what string, change func()) {
		apart := f.Namespace(t)
		writes := harness.KeepWriting(t, apart, f.Node)
		begin := time.Now()
		change()
		f.voting(t, f.Node)
		t.Logf("%s after %s", what, harness.Since(begin))
		writes.Check(t, what, apart, f.Node)
		if s := f.all[len(f.all)-1]; s != f.Node {
			if err := s.Signal(syscall.SIGKILL, 5*time.Second); err != nil {
				t.Fatal(err)
			}
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
			f.voting(t, f.Node)
		}
		f.AwaitEndpoints(t, f.all...)
	}
	grow := func() {
		for range 2 {
			s := onMachine(t, f.Fleet)
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
			f.all = append(f.all, s)
		}
	}
	shrink := func() {
		for range 2 {
			gone := f.all[len(f.all)-1]
			f.Kedge(t, "server", "remove", gone.Name)
			select {
			case <-gone.Done:
			case <-time.After(30 * time.Second):
				t.Fatal("a removed server goes on")
			}
			f.all = f.all[:len(f.all)-1]
		}
	}
	step("three servers", grow)
	step("five servers", grow)
	step("three servers again", shrink)
	step("one server again", shrink)
	h.End(t)
}
