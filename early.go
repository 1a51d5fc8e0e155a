package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
)

// early answers "kedge status" before there are components: while the clock is wrong, or
// no server lets the machine join.
type early struct {
	began time.Time
	mu    sync.Mutex // guards now
	now   lifecycle.Status
}

// answer begins to answer for a node. It must be ended before the components run, of
// which one answers from then on.
func (e *early) answer(ctx context.Context, s settings, log *slog.Logger) (end func()) {
	asked := control.NewServer(s.runDir, func(context.Context) control.Report {
		return reportOf(s.nodeName, e.began, []lifecycle.Status{e.status()})
	})
	asked.Otherwise(func() error {
		now := e.status()
		return fmt.Errorf("kedge cannot do that yet: %s: %s", now.Name, now.Detail)
	})
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := asked.Run(ctx, func() {}); err != nil && !errors.Is(err, context.Canceled) {
			log.Warn("\"kedge status\" is not answered until the components run", "err", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// step says what is being done from now on.
func (e *early) step(name, detail string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.now = lifecycle.Status{Name: name, State: lifecycle.Starting, Since: time.Now(), Waited: lifecycle.Duration(time.Since(e.began)), Detail: detail}
}

func (e *early) status() lifecycle.Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.now
}
