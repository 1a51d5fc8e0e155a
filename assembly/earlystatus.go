package assembly

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

// earlyStatus answers "kedge status" before the components run: while the clock is wrong, or the machine cannot
// join.
type earlyStatus struct {
	build Build
	began time.Time
	mu    sync.Mutex // guards now
	now   lifecycle.Status
}

// answer starts to answer status requests for a node. end must be called before the components run, because one
// of them then answers on the same socket.
func (e *earlyStatus) answer(ctx context.Context, s Config, log *slog.Logger) (end func()) {
	requests := control.NewServer(s.RunDir, func(context.Context) control.Report {
		return reportOf(e.build, s.NodeName, e.began, []lifecycle.Status{e.status()})
	})
	requests.Fallback(func() error {
		now := e.status()
		return fmt.Errorf("kedge cannot do that yet: %s: %s", now.Name, now.Detail)
	})
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := requests.Run(ctx, func() {}); err != nil && !errors.Is(err, context.Canceled) {
			log.Warn("\"kedge status\" does not work until the components run", "err", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// step sets the current step of the start.
func (e *earlyStatus) step(name, detail string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.now = lifecycle.Status{Name: name, State: lifecycle.Starting, Since: time.Now(), Waited: lifecycle.Duration(time.Since(e.began)), Detail: detail}
}

func (e *earlyStatus) status() lifecycle.Status {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.now
}
