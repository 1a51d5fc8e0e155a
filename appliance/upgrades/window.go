package upgrades

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Window is a stretch of time that comes back every day, or on some days of the week.
type Window struct {
	Days     []string `json:"days,omitempty"`     // on which it opens, Mon to Sun; none for all
	Start    string   `json:"start"`              // of the form 15:04
	Duration string   `json:"duration"`           // as Go writes it
	TimeZone string   `json:"timeZone,omitempty"` // as the IANA names it; empty for UTC
}

// maxWindow is the longest window: one that comes back daily must have closed by then.
const maxWindow = 24 * time.Hour

// at reports whether the window is open at a time, and when it opens next if it is not.
func (w *Window) at(t time.Time) (open bool, opens time.Time, err error) {
	if w == nil {
		return true, opens, nil
	}
	zone, err := time.LoadLocation(w.TimeZone)
	if err != nil || w.TimeZone == "Local" { // the servers' own zones may differ
		return false, opens, fmt.Errorf("spec.window.timeZone %q is not the name of a time zone, such as Europe/Berlin", w.TimeZone)
	}
	start, err := time.Parse("15:04", w.Start)
	if err != nil {
		return false, opens, fmt.Errorf("spec.window.start %q is not a time of day, such as 02:00", w.Start)
	}
	length, err := time.ParseDuration(w.Duration)
	if err != nil || length <= 0 || length > maxWindow {
		return false, opens, fmt.Errorf("spec.window.duration %q is not a time of at most %s, such as 2h30m", w.Duration, maxWindow)
	}
	for _, day := range w.Days {
		if !slices.Contains(dayNames, day) {
			return false, opens, fmt.Errorf("spec.window.days has %q, and a day is one of %s", day, strings.Join(dayNames, ", "))
		}
	}
	t = t.In(zone)
	for offset := -1; offset <= 7; offset++ { // a window of yesterday may be open
		begin := time.Date(t.Year(), t.Month(), t.Day()+offset, start.Hour(), start.Minute(), 0, 0, zone)
		switch day := dayNames[begin.Weekday()]; {
		case len(w.Days) > 0 && !slices.Contains(w.Days, day):
		case t.Before(begin):
			return false, begin, nil
		case t.Before(begin.Add(length)):
			return true, opens, nil
		}
	}
	return false, opens, fmt.Errorf("spec.window never opens") // some day of the next seven is in Days
}

// dayNames are the days of the week, as time.Weekday counts them.
var dayNames = []string{"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}
