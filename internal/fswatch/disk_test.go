package fswatch

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/internal/lifecycle"
)

// lockedBuffer is a log that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestStalledDiskIsNamedWhileItStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log lockedBuffer
		w := NewDisk("/data", slog.New(slog.NewTextHandler(&log, nil)))
		var stalls, writes atomic.Int64
		w.write = func() error { writes.Add(1); time.Sleep(time.Duration(stalls.Load())); return nil }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx, func() {}) }()
		time.Sleep(time.Second)
		if err := w.Check(t.Context()); err != nil {
			t.Errorf("a disk that works: %v", err)
		}
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if log.String() != "" {
			t.Errorf("of a disk that works the log says %s", &log)
		}
		stalls.Store(int64(5 * time.Minute))
		time.Sleep(probeInterval + WriteLimit)
		if c := strings.Count(log.String(), "the disk stalls"); c != 1 {
			t.Errorf("it is named %d times, want once: %s", c, &log)
		}
		before := writes.Load()
		for range 2 {
			var stalled *StalledError
			if err := w.Check(t.Context()); !errors.As(err, &stalled) || !strings.Contains(err.Error(), "the disk of /data stalls") {
				t.Errorf("status says %v", err)
			}
		}
		if now := writes.Load(); now != before {
			t.Errorf("%d more writes wait behind the one that stalls", now-before)
		}
		stalls.Store(0)
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		if c := strings.Count(log.String(), "the disk has finished a write again"); c != 1 {
			t.Errorf("its end is said %d times: %s", c, &log)
		}
		if err := w.Check(t.Context()); err != nil {
			t.Errorf("afterwards: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// While the disk stalls, what waits for it is not accused; what has a problem of its own is.
func TestExcuse(t *testing.T) {
	for _, stalls := range []bool{false, true} {
		in := []lifecycle.Status{{Name: "disk"}, {Name: "kubelet", Error: "no answer", NoAnswer: true}, {Name: "dns", Error: "port taken"}}
		if stalls {
			in[0].Error = "the disk stalls"
		}
		out := Excuse(in)
		if got := out[1].Error == ""; got != stalls {
			t.Errorf("disk stalls: %v; the kubelet is %+v", stalls, out[1])
		}
		if out[2].Error == "" {
			t.Errorf("disk stalls: %v; dns is %+v", stalls, out[2])
		}
	}
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	w := NewDisk(dir, slog.New(slog.DiscardHandler))
	for range 2 {
		if err := w.Check(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if info, err := os.Stat(filepath.Join(dir, fileName)); err != nil || info.Size() != 21 {
		t.Errorf("%v, %v", info, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := w.Check(t.Context()); err == nil {
		t.Error("a directory that is gone passes")
	}
}
