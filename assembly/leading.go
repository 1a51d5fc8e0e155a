package assembly

import (
	"context"
	"log/slog"
	"time"

	"kedge/datastore"
)

// leadership is the component that logs changes of the leader.
type leadership struct {
	now func() (datastore.Leadership, <-chan struct{})
	log *slog.Logger
}

// Name implements lifecycle.Component.
func (l *leadership) Name() string { return "leadership" }

// Run implements lifecycle.Component.
func (l *leadership) Run(ctx context.Context, ready func()) error {
	ready()
	var leader string  // the last known leader; empty before the first
	var lost time.Time // zero while there is a leader
	for {
		now, changed := l.now()
		switch {
		case leader == "":
			leader = now.Leader // the first leader is not a change
		case now.Leader == "" && lost.IsZero():
			lost = time.Now()
			l.log.Warn("the servers have no leader: nothing can be changed, and pods go on as they are, until a majority of them agrees on one", "was", leader)
		case now.Leader != "" && (!lost.IsZero() || now.Leader != leader):
			if lost.IsZero() {
				l.log.Info("another server leads", "leader", now.Leader, "was", leader)
			} else {
				l.log.Info("the servers have a leader again", "leader", now.Leader, "was", leader, "after", time.Since(lost).Round(time.Millisecond))
			}
			leader, lost = now.Leader, time.Time{}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}
