// Package clock keeps a node from starting with a clock that cannot be right.
//
// A device without a battery-backed clock wakes up decades ago. Certificates
// would be refused and every time stamp would be wrong, until NTP or a person
// sets the clock; then everything that measures time would jump. So start-up
// waits. A clock that is wrong but possible is not noticed here: certificates are
// valid from long before, and are renewed when they seem to be from the future.
//
// Only package main imports it.
package clock

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// slack is how much earlier than the build a clock may be: build machines and
// time zones are not perfect either.
const slack = 24 * time.Hour

// Wait returns when the clock shows no less than floor, the time at which this
// kedge was built, or with the cause when ctx ends. It says once what it waits
// for, and again every five minutes.
func Wait(ctx context.Context, floor time.Time, log *slog.Logger) error {
	return wait(ctx, floor, log, time.Now)
}

func wait(ctx context.Context, floor time.Time, log *slog.Logger, now func() time.Time) error {
	if !now().Before(floor.Add(-slack)) {
		return nil
	}
	const every = 5 * time.Minute
	var waited, said time.Duration
	for now().Before(floor.Add(-slack)) {
		if waited == 0 || waited-said >= every {
			said = waited
			log.Warn(fmt.Sprintf("waiting for the right time: the clock shows %s, and this kedge was built on %s; set the clock, or connect a time server",
				now().Format(time.DateTime), floor.Format(time.DateOnly)))
		}
		const step = time.Second
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(step): // by the monotonic clock, which does not jump
			waited += step
		}
	}
	log.Info("the clock was set", "time", now().Format(time.DateTime), "waited", waited)
	return nil
}
