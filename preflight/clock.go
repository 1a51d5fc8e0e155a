package preflight

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// clockSlack is how much earlier than the build a clock may be: the clocks and time zones of
// build machines are not perfect either.
const clockSlack = 24 * time.Hour

// WaitForClock returns when the clock shows at least floor, the time at which this kedge was
// built, or with the cause when ctx ends. It logs the reason for waiting every five minutes.
//
// A device without a battery-backed clock starts decades in the past. Certificates would be
// refused and every time stamp would be wrong until NTP or a person sets the clock; then
// everything that measures time would jump. A clock that is wrong but possible is not
// noticed: certificates are valid from long before, and are renewed when they seem to be from
// the future.
func WaitForClock(ctx context.Context, floor time.Time, log *slog.Logger) error {
	return waitForClock(ctx, floor, log, time.Now)
}

func waitForClock(ctx context.Context, floor time.Time, log *slog.Logger, now func() time.Time) error {
	if !now().Before(floor.Add(-clockSlack)) {
		return nil
	}
	const every = 5 * time.Minute
	var waited, logged time.Duration
	for now().Before(floor.Add(-clockSlack)) {
		if waited == 0 || waited-logged >= every {
			logged = waited
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
