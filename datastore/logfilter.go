package datastore

import (
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap/zapcore"

	"kedge/internal/logging"
)

// expected holds etcd's warnings and errors about events that are normal here. They are logged at debug level; all other
// messages keep their level.
var expected = map[string]bool{
	// The storage version is written after the first commit to the database file, which here takes seconds instead of a
	// tenth of one. etcd retries by itself.
	"Failed to detect schema version":  true,
	"failed to update storage version": true,
	"Failed to detect storage schema version. Please wait till wal snapshot before upgrading cluster.": true,
	// A stop during the start.
	"failed to update cluster version":                       true,
	"stopped publish because server is stopping":             true,
	"failed to publish local member to cluster through raft": true, // etcd repeats it if the cause persists

	// Members that stop and start. Raft's transport logs for each connection and each attempt what the peer link logs once
	// (peers/link.go).
	"lost TCP streaming connection with remote peer":                        true,
	"closed TCP streaming connection with remote peer":                      true,
	"peer became inactive (message send to peer failed)":                    true,
	"failed to reach the peer URL":                                          true,
	"failed to get version":                                                 true,
	"failed to get downgrade enabled status":                                true,
	"failed to get cluster response":                                        true,
	"prober detected unhealthy status":                                      true,
	"dropped internal Raft message since sending buffer is full":            true,
	"dropped internal Raft message since pipeline's sending buffer is full": true,
	"leadership transfer failed":                                            true,
	"failed to find remote peer in cluster":                                 true,
	"failed to process Raft message":                                        true,
	"failed hash kv request":                                                true,
	"ignored streaming request; ID mismatch":                                true,
	"failed to unmarshal response":                                          true,
	"rejected stream from remote peer because it was removed":               true,
	"rejected Raft message from removed member":                             true,
	"rejected Raft message to mismatch member":                              true,
	"cannot fetch hash from slow remote peer":                               true,
	"failed to fetch hash from peer":                                        true,
	"skipped attributes update of removed member":                           true,
	"skipped removing already removed peer":                                 true,
	"waiting for ReadIndex response took too long, retrying":                true,
	"ignored out-of-date read index response; local node read indexes queueing up and waiting to be in sync with leader": true,
	// Learners that are still catching up, and changes that are retried in a moment.
	"rejecting promote learner: learner is not ready":                                                                       true,
	"rejecting member add request; local member has not been connected to majority peers, reconfigure breaks active quorum": true,
	"rejecting member remove request; local member has not been connected to all peers, reconfigure breaks active quorum":   true,
	// Run reports it as ErrRemoved.
	"server error": true,
	"data-dir used by this member must be removed": true,
}

// leaderSteppedDown is the end of raft's message that a leader has lost its followers. The component "leadership" logs the
// loss of the leader.
const leaderSteppedDown = "stepped down to follower since quorum is not active"

// rateLimited holds etcd's warnings about single requests or raft heartbeats that waited for the disk or a processor. A slow
// machine would log hundreds; one per rateLimitInterval is enough.
var rateLimited = []string{
	"apply request took too long",
	"leader failed to send out heartbeat on time; took too long, leader is overloaded likely from slow disk",
}

const rateLimitInterval = int64(time.Minute)

// filterCore is a zapcore.Core that logs expected messages at debug level, and limits the rate of others.
type filterCore struct {
	zapcore.Core
	last map[string]*atomic.Int64 // time of the last log line for each of rateLimited, in Unix nanoseconds
}

func newFilterCore(core zapcore.Core) zapcore.Core {
	last := map[string]*atomic.Int64{}
	for _, message := range rateLimited {
		last[message] = new(atomic.Int64)
	}
	return filterCore{core, last}
}

func (c filterCore) With(fields []zapcore.Field) zapcore.Core {
	return filterCore{c.Core.With(fields), c.last}
}

// suppressed reports whether the message is one of rateLimited, and was logged recently or follows from the loss of the
// leader.
func (c filterCore) suppressed(message string, now time.Time) bool {
	lastLogged := c.last[message]
	if lastLogged == nil {
		return false
	}
	if logging.IsInterrupted() {
		return true // every request waits for a leader
	}
	last := lastLogged.Load()
	return now.UnixNano()-last < rateLimitInterval || !lastLogged.CompareAndSwap(last, now.UnixNano())
}

func (c filterCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if expected[entry.Message] || strings.HasSuffix(entry.Message, leaderSteppedDown) || c.suppressed(entry.Message, entry.Time) {
		entry.Level = zapcore.InfoLevel // logging.Zap logs etcd's info level as debug
	}
	return c.Core.Check(entry, checked)
}
