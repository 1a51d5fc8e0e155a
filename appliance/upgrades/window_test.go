package upgrades

import (
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // of the test's machine, which may have none; kedge has it in its executable
)

func TestWindow(t *testing.T) {
	const form = "2006-01-02 15:04 MST"
	at := func(text string) time.Time {
		t.Helper()
		v, err := time.Parse("2006-01-02 15:04", text)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	nights := &Window{Start: "23:00", Duration: "3h"}
	weekend := &Window{Days: []string{"Sat", "Sun"}, Start: "02:00", Duration: "2h30m"}
	berlin := &Window{Start: "02:30", Duration: "1h", TimeZone: "Europe/Berlin"}
	for name, tc := range map[string]struct {
		window *Window
		at     string // in UTC
		opens  string // empty if it is open
	}{
		"none":                            {nil, "2026-11-29 12:00", ""},
		"before":                          {nights, "2026-11-29 22:59", "2026-11-29 23:00 UTC"},
		"at its start":                    {nights, "2026-11-29 23:00", ""},
		"after midnight":                  {nights, "2026-11-30 01:59", ""},
		"at its end":                      {nights, "2026-11-30 02:00", "2026-11-30 23:00 UTC"},
		"another day":                     {weekend, "2026-11-30 02:30", "2026-12-05 02:00 UTC"},
		"its day":                         {weekend, "2026-11-29 03:00", ""},
		"after it, of the same weekday":   {&Window{Days: []string{"Sun"}, Start: "02:00", Duration: "1h"}, "2026-11-29 12:00", "2026-12-06 02:00 UTC"},
		"all day":                         {&Window{Start: "00:00", Duration: "24h"}, "2026-11-29 23:59", ""},
		"another time zone":               {berlin, "2026-11-29 01:00", "2026-11-29 02:30 CET"},
		"open there":                      {berlin, "2026-11-29 02:00", ""},
		"in the hour that does not exist": {berlin, "2026-03-29 00:00", "2026-03-29 03:30 CEST"},
	} {
		t.Run(name, func(t *testing.T) {
			open, opens, err := tc.window.at(at(tc.at))
			if err != nil {
				t.Fatal(err)
			}
			if open != (tc.opens == "") || !open && opens.Format(form) != tc.opens {
				t.Errorf("%v, %s", open, opens.Format(form))
			}
		})
	}
	for name, w := range map[string]*Window{
		"timeZone": {Start: "02:00", Duration: "1h", TimeZone: "Berlin"},
		"start":    {Start: "2 am", Duration: "1h"},
		"duration": {Start: "02:00", Duration: "25h"},
		"days":     {Start: "02:00", Duration: "1h", Days: []string{"Sunday"}},
	} {
		if _, _, err := w.at(at("2026-11-29 12:00")); err == nil || !strings.Contains(err.Error(), "spec.window."+name+" ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := (&Window{Start: "02:00", Duration: "1h", TimeZone: "Local"}).at(at("2026-11-29 12:00")); err == nil {
		t.Error("the machine's own time zone is accepted")
	}
}
