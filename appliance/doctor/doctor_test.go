package doctor

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestRun: checks run side by side, each within its limit; what cannot be looked at is said.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := healthy()
		release := make(chan struct{})
		read := func(err error) func(context.Context, *subject) (int, error) {
			return func(context.Context, *subject) (int, error) {
				time.Sleep(time.Second)
				return 7, err
			}
		}
		judge := func(_ *subject, n int) []Finding { return []Finding{{Level: Warning, What: strings.Repeat("x", n)}} }
		start := time.Now()
		r := s.run(t.Context(), []check{
			newCheck("good", quick, read(nil), judge),
			newCheck("bad", quick, read(errors.New("no permission")), judge),
			newCheck("away", quick, read(skip("no node")), judge),
			newCheck("hangs", 2*time.Second, func(context.Context, *subject) (int, error) { <-release; return 0, nil }, judge),
		})
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("took %s", took)
		}
		close(release)
		r.sort()
		want := `WARNING  good: xxxxxxx
UNKNOWN  bad: the check could not be made: no permission
UNKNOWN  hangs: the check could not be made: it did not finish within 2s
1 warning, 2 unknown by 1 check; kedge runs as process 77, node edge
`
		if got := r.text(time.Now()); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
		if len(r.Skipped) != 1 || r.Skipped[0] != (Skipped{"away", "no node"}) {
			t.Errorf("skipped %+v", r.Skipped)
		}
	})
}

// TestJSON fixes the names of the fields, which programs read.
func TestJSON(t *testing.T) {
	r := Report{Version: "v1", Node: "n", Kedge: Running, PID: 7, Checks: 2, Skipped: []Skipped{{"c", "r"}},
		Findings: []Finding{{Level: Problem, Check: "c", Subject: "s", What: "w", Since: now, Remedy: "r", Fixed: "f"}, {Level: Warning, Check: "c", Subject: "s", What: "w"}}}
	got, err := json.Marshal(r)
	want := `{"version":"v1","node":"n","kedge":"running","pid":7,"checks":2,"findings":[{"level":"problem","check":"c","subject":"s","what":"w","since":"2026-11-29T12:00:00Z","remedy":"r","fixed":"f"},{"level":"warning","check":"c","subject":"s","what":"w"}],"skipped":[{"check":"c","reason":"r"}]}`
	if err != nil || string(got) != want {
		t.Errorf("%v\n%s\nwant\n%s", err, got, want)
	}
	if got := (Report{Kedge: Absent, Checks: 3}).String(); got != "no problems found by 3 checks; no node was started on this machine\n" {
		t.Errorf("%q", got)
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{3 * time.Second: "3s", 61 * time.Second: "1m1s", 90 * time.Minute: "1h30m", 50 * time.Hour: "2 days"} {
		if got := age(d); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
}
