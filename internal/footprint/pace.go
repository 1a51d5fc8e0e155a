package footprint

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	// busyGC is for a busy node: at settledGC the collector would take a quarter of its
	// processor time. The memory limit still holds.
	busyGC = 100
	// A node is busy from busyCycles collections within settledPeriod on, and until there
	// are quietCycles collections or fewer within busyPeriod at busyGC.
	busyCycles, settledPeriod = 3, 2 * time.Second
	quietCycles, busyPeriod   = 2, 10 * time.Second
)

// Tend makes the collector spend memory while the node is busy, and processor time while it is
// idle, from Settle on until ctx ends. It does nothing if the user has set GOGC or memory is
// tight.
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

// pace returns the next percentage of the collector after a number of collections, and the time
// until the next call.
func pace(percent int, cycles uint64) (int, time.Duration) {
	if percent == settledGC && cycles < busyCycles || percent == busyGC && cycles <= quietCycles {
		return settledGC, settledPeriod
	}
	return busyGC, busyPeriod
}
