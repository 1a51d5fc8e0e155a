package preflight

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

var built = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

func TestPossibleClocksAreNotWaitedFor(t *testing.T) {
	for _, now := range []time.Time{built, built.Add(-time.Hour), built.AddDate(30, 0, 0)} {
		if err := waitForClock(t.Context(), built, slog.Default(), func() time.Time { return now }); err != nil {
			t.Errorf("%s: %v", now, err)
		}
	}
}

func TestWaitsUntilTheClockIsSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		begin := time.Now()
		now := func() time.Time {
			if time.Since(begin) < 12*time.Minute {
				return time.Unix(0, 0).UTC()
			}
			return built.AddDate(0, 1, 0)
		}
		if err := waitForClock(t.Context(), built, slog.New(slog.NewTextHandler(&log, nil)), now); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begin); took != 12*time.Minute {
			t.Errorf("waited %s, want 12m", took)
		}
		if n := strings.Count(log.String(), "waiting for the right time"); n != 3 {
			t.Errorf("said so %d times, want 3:\n%s", n, log.String())
		}
		if !strings.Contains(log.String(), "1970-01-01") || !strings.Contains(log.String(), "set the clock") {
			t.Errorf("the message names neither time nor remedy: %s", log.String())
		}
	})
}

func TestWaitEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Minute, func() { cancel(stop) })
		err := waitForClock(ctx, built, slog.New(slog.DiscardHandler), func() time.Time { return time.Unix(0, 0) })
		if !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
	})
}
