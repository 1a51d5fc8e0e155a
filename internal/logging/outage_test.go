package logging

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// What fails for want of a leader is said once, and elsewhere; what fails for another
// reason is said meanwhile, too.
func TestInterrupted(t *testing.T) {
	var out bytes.Buffer
	log := Embedded(New(&out, Config{Level: slog.LevelInfo}), "kubernetes")
	say := func() (lines int) {
		out.Reset()
		log.Error("Unhandled Error", "err", errors.New("etcdserver: no leader"))
		log.Warn("watch chan error: etcdserver: no leader")
		log.Error("Failed to update lease", "err", errors.New("context deadline exceeded"))
		log.Error("Error syncing pod", "err", errors.New("ErrImagePull"))
		return strings.Count(out.String(), "\n")
	}
	t.Cleanup(func() { interrupted.Store(0) })
	if n := say(); n != 4 {
		t.Errorf("%d of 4 lines on a good day:\n%s", n, &out)
	}
	Interrupted(true)
	if n := say(); n != 1 || !strings.Contains(out.String(), "ErrImagePull") {
		t.Errorf("without a leader:\n%s", &out)
	}
	Interrupted(false)
	if n := say(); n != 1 || !IsInterrupted() {
		t.Errorf("just afterwards:\n%s", &out)
	}
	interrupted.Add(-int64(aftermath))
	if n := say(); n != 4 || IsInterrupted() {
		t.Errorf("%d of 4 lines later:\n%s", n, &out)
	}
}
