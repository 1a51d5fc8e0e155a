package snapshots

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"kedge/datastore"
	"kedge/server/snapshots/archive"
)

func TestSchedule(t *testing.T) {
	at := func(text string) time.Time {
		parsed, err := time.Parse("2006-01-02 15:04", text)
		if err != nil {
			t.Fatal(err)
		}
		return parsed
	}
	daily, err := ParseSchedule("30 2 * * *", "n")
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct{ last, now, want string }{
		"the next day":             {"2026-01-01 02:30", "2026-01-01 12:00", "2026-01-02 02:30"},
		"missed":                   {"2026-01-01 02:30", "2026-01-05 12:00", "2026-01-05 12:05"},
		"taken by a clock ahead":   {"2027-01-01 02:30", "2026-01-01 12:00", "2026-01-02 02:30"},
		"a cluster made this hour": {"2026-01-01 12:00", "2026-01-01 12:01", "2026-01-02 02:30"},
	} {
		if got := daily.next(at(c.last), at(c.now)); !got.Equal(at(c.want)) {
			t.Errorf("%s: %s, want %s", what, got, c.want)
		}
	}
	minutes := map[int]bool{}
	for _, node := range []string{"server-1", "server-2", "server-3"} {
		s, err := ParseSchedule(DefaultSchedule, node)
		if err != nil {
			t.Fatal(err)
		}
		next := s.next(at("2026-01-01 00:00"), at("2026-01-01 00:00"))
		minutes[next.Minute()] = true
	}
	if len(minutes) != 3 {
		t.Errorf("three servers have the minutes %v", minutes)
	}
	for _, bad := range []string{"", "daily", "H", "* * * *", "61 * * * *", "H H * * *", "* * 31 2 *"} {
		if _, err := ParseSchedule(bad, "n"); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	if s, err := ParseSchedule(NoSchedule, "n"); err != nil || s.cron != nil {
		t.Errorf("off: %+v, %v", s, err)
	}
}

// copying is a datastore whose snapshots are copies of one file.
type copying struct {
	database []byte
	saved    datastore.Snapshot
}

func (c copying) SaveSnapshot(_ context.Context, path string) (datastore.Snapshot, error) {
	return c.saved, os.WriteFile(path, c.database, 0o600)
}

// TestFollowsSchedule lets six hours pass: a snapshot is taken each hour, and the two newest are kept, beside those that somebody
// has taken.
func TestFollowsSchedule(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	s.put("/a", "x")
	path := filepath.Join(t.TempDir(), "a.db")
	var source copying
	var err error
	if source.saved, err = s.store.SaveSnapshot(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	stop()
	if source.database, err = os.ReadFile(path); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		saver := s.saver()
		saver.source = source
		if saver.cfg.Schedule, err = ParseSchedule("0 * * * *", "one"); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if _, err := saver.Save(t.Context(), archive.OnDemand, nil); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Hour+time.Minute)
		defer cancel()
		if err := saver.Run(ctx, func() {}); err != nil {
			t.Fatal(err)
		}
		all, err := archive.List(saver.cfg.Folder)
		if err != nil {
			t.Fatal(err)
		}
		var hours []float64
		for _, l := range all {
			hours = append(hours, l.Taken.Sub(begin).Hours())
		}
		if want := []float64{0, 5, 6}; !slices.Equal(hours, want) {
			t.Errorf("there are snapshots after %v hours, want %v", hours, want)
		}
	})
}
