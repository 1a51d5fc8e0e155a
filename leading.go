package main

import (
	"context"
	"log/slog"
	"time"

	"kedge/datastore"
	"kedge/internal/logging"
)

// leading is the component that says in the log who leads the cluster, and keeps what
// embedded components say for want of a leader out of it.
type leading struct {
	now func() (datastore.Leadership, <-chan struct{})
	log *slog.Logger
}

// Name implements lifecycle.Component.
func (l *leading) Name() string { return "leadership" }

// Run implements lifecycle.Component.
func (l *leading) Run(ctx context.Context, ready func()) error {
	ready()
	defer logging.Interrupted(false)
	var leader string  // the last that was known; empty before the first
	var lost time.Time // zero while there is one
	for {
		now, changed := l.now()
		switch {
		case leader == "":
			leader = now.Leader // that there is one at the start is no news
		case now.Leader == "" && lost.IsZero():
			lost = time.Now()
			logging.Interrupted(true)
			l.log.Warn("the servers have no leader: nothing can be changed, and pods go on as they are, until a majority of them agrees on one", "was", leader)
		case now.Leader != "" && (!lost.IsZero() || now.Leader != leader):
			// Calls that the last leader did not answer fail now, so also without a pause.
			logging.Interrupted(false)
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
