package footprint

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// busyGC is for a node that has much to do: at settledGC every fourth part of its
	// processor time would be the collector's. The memory limit holds all the same.
	busyGC = 100
	// Where the collector runs busyCycles times within settledPeriod there is much to
	// do, and where it runs, at busyGC, quietCycles times or less within busyPeriod
	// that is over.
	busyCycles, settledPeriod = 3, 2 * time.Second
	quietCycles, busyPeriod   = 2, 10 * time.Second
)

// Tend makes the collector spend memory while there is much to do, and processor time
// while there is not, from Settle on until ctx ends. Users' GOGC wins, and where memory
// is tight it stays as it is.
func Tend(ctx context.Context) {
	if memory, known := available(); os.Getenv("GOGC") != "" || !known || memory < tight {
		return
	}
	sample := []metrics.Sample{{Name: "/gc/cycles/automatic:gc-cycles"}}
	cycles := func() uint64 {
		metrics.Read(sample)
		return sample[0].Value.Uint64()
	}
	percent, period, last := settledGC, settledPeriod, cycles()
	timer := time.NewTimer(period)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := cycles()
		var other int
		if other, period = pace(percent, now-last); other != percent {
			percent = other
			debug.SetGCPercent(percent)
		}
		last = now
		timer.Reset(period)
	}
}

// pace is how the collector should go on that has run so many times since it was last
// asked for, and when to ask again.
func pace(percent int, cycles uint64) (int, time.Duration) {
	if percent == settledGC && cycles < busyCycles || percent == busyGC && cycles <= quietCycles {
		return settledGC, settledPeriod
	}
	return busyGC, busyPeriod
}
