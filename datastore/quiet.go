package datastore

import (
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap/zapcore"

	"kedge/internal/logging"
)

// expected are etcd's warnings and errors about what is normal here; they are logged as debug. Everything else
// keeps its level.
var expected = map[string]bool{
	// The storage version is written after the first commit to the database file, which here is seconds away
	// and not a tenth of one. etcd tries again by itself.
	"Failed to detect schema version":  true,
	"failed to update storage version": true,
	"Failed to detect storage schema version. Please wait till wal snapshot before upgrading cluster.": true,
	// A stop during the start.
	"failed to update cluster version":                       true,
	"stopped publish because server is stopping":             true,
	"failed to publish local member to cluster through raft": true, // and it says so again if it goes on

	// Members that come and go. Raft's transport says for each connection and each attempt what the ways say
	// once (see way.run).
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
	// Learners that are still catching up, and changes that are made again in a moment.
	"rejecting promote learner: learner is not ready":                                                                       true,
	"rejecting member add request; local member has not been connected to majority peers, reconfigure breaks active quorum": true,
	"rejecting member remove request; local member has not been connected to all peers, reconfigure breaks active quorum":   true,
	// Said by Run, as ErrRemoved.
	"server error": true,
	"data-dir used by this member must be removed": true,
}

// resigned ends raft's line about a leader that has lost its followers. That there is no leader is said by whoever
// watches the leadership.
const resigned = "stepped down to follower since quorum is not active"

// seldom are etcd's warnings for each single request, or heartbeat, that waited for the disk or a processor. On a
// slow machine there would be hundreds; one in a while says it.
var seldom = []string{
	"apply request took too long",
	"leader failed to send out heartbeat on time; took too long, leader is overloaded likely from slow disk",
}

const seldomEvery = int64(time.Minute)

// quietCore is a zapcore.Core that keeps the expected out of sight, and repeats itself little.
type quietCore struct {
	zapcore.Core
	last map[string]*atomic.Int64 // when each of the seldom was shown, in nanoseconds
}

func newQuietCore(core zapcore.Core) zapcore.Core {
	last := map[string]*atomic.Int64{}
	for _, message := range seldom {
		last[message] = new(atomic.Int64)
	}
	return quietCore{core, last}
}

func (c quietCore) With(fields []zapcore.Field) zapcore.Core {
	return quietCore{c.Core.With(fields), c.last}
}

// tooSoon reports whether the message is one of the seldom, and was shown just now or need not be.
func (c quietCore) tooSoon(message string, now time.Time) bool {
	shown := c.last[message]
	if shown == nil {
		return false
	}
	if logging.IsInterrupted() {
		return true // everything waits for a leader
	}
	last := shown.Load()
	return now.UnixNano()-last < seldomEvery || !shown.CompareAndSwap(last, now.UnixNano())
}

func (c quietCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if expected[entry.Message] || strings.HasSuffix(entry.Message, resigned) || c.tooSoon(entry.Message, entry.Time) {
		entry.Level = zapcore.InfoLevel // which is debug to us
	}
	return c.Core.Check(entry, checked)
}
