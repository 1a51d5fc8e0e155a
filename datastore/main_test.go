package datastore

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// Tests that need a process to kill, or to fail, start this binary again.
	if role := os.Getenv(childRole); role != "" {
		os.Exit(runChild(role))
	}
	goleak.VerifyTestMain(m,
		// Started for the life of the process by init functions of libraries.
		goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"),
		goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"),
	)
}

// longVar enables tests that take minutes: many members, one after the other, under faults. "make test" sets it, without
// the race detector; the shorter tests run the same code with it.
const longVar = "KEDGE_TEST_LONG"

func long() bool { return os.Getenv(longVar) != "" }

func requireLong(t *testing.T) {
	t.Helper()
	if !long() {
		t.Skip("takes long: set " + longVar + "=1, or run make test-datastore")
	}
}

func testConfig(dir string) Config {
	c := DefaultConfig()
	c.Dir = dir
	return c
}

func testLog(tb testing.TB) *slog.Logger {
	level := slog.LevelInfo
	if os.Getenv("KEDGE_TEST_DEBUG") != "" {
		level = slog.LevelDebug
	}
	var out io.Writer = testWriter{tb}
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: level}))
}

type testWriter struct{ tb testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.tb.Logf("%s", p)
	return len(p), nil
}

// start runs a store until the end of the test or a call of stop, which fails the test on any error.
func start(tb testing.TB, cfg Config) (s *Store, stop func()) {
	tb.Helper()
	s = New(cfg, testLog(tb))
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()

	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			if err != nil {
				tb.Errorf("Run: %v", err)
			}
		case <-time.After(30 * time.Second):
			tb.Errorf("Run did not return")
		}
	}
	tb.Cleanup(stop)
	select {
	case <-ready:
	case err := <-done:
		stopped = true
		cancel()
		tb.Fatalf("Run: %v", err)
	}
	return s, stop
}

func newClient(tb testing.TB, s *Store) *kubernetes.Client {
	tb.Helper()
	c, err := s.NewClient()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// fill writes n keys under prefix and returns the revision of the last.
func fill(tb testing.TB, c *kubernetes.Client, prefix string, n int, value string) int64 {
	tb.Helper()
	var revision int64
	for i := range n {
		resp, err := c.Put(tb.Context(), fmt.Sprintf("%s%05d", prefix, i), value)
		if err != nil {
			tb.Fatal(err)
		}
		revision = resp.Header.Revision
	}
	return revision
}
