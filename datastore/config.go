package datastore

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// Config is what a Store is built from. Every write is on disk before it is acknowledged; there is
// deliberately no field that could change that.
type Config struct {
	// Dir holds everything of the store and belongs to it alone. It is created if missing. Absolute.
	Dir string

	// MemberName names this member among the servers of the cluster.
	MemberName string

	// Peer is how this member and others reach each other. It may be empty, for a store that stays alone.
	Peer PeerConfig

	// Join is the admission to a store that other members have, for the first start of a new member. It is
	// ignored once the directory holds a store.
	Join *Admission

	// Tick is raft's unit of time and Election how long a follower waits for a leader before it stands for
	// election. All members of a cluster must agree on both.
	Tick, Election time.Duration

	// Alone is for a store of one member, Several for one of more. Members need not agree on it; each takes
	// what fits when it starts, so the first one keeps to Alone until it starts again.
	Alone, Several Pace

	// Quota is the size of the database file above which writes are refused. Zero means a quarter of the
	// volume, at most 2 GiB.
	Quota int64

	Defrag DefragConfig
}

// Pace says how much is kept in memory before it is written in bulk. Nothing is at risk by waiting: the
// write-ahead log has it all.
type Pace struct {
	// BatchInterval and BatchLimit bound how long, and how many, changes wait in memory before they are
	// committed to the database file. The limit also bounds the buffer that every read copies.
	BatchInterval time.Duration
	BatchLimit    int

	// SnapshotCount is after how many raft entries the log is cut, and SnapshotCatchUp how many are kept
	// beyond the cut for a member that lags. Both are held in memory.
	SnapshotCount, SnapshotCatchUp uint64
}

// DefragConfig says when the database file is rewritten to give space back to the file system. That stops
// all reads and writes while it lasts, so it waits for a quiet moment.
type DefragConfig struct {
	// Interval is how often the size is looked at, and the span over which quiet is judged.
	Interval time.Duration
	// MinSize is the file size under which rewriting is not worth it.
	MinSize int64
	// MaxFree is the part of the file that may be unused, from 0 to 1.
	MaxFree float64
	// QuietRate is how many raft entries in a second still count as quiet.
	QuietRate float64
	// Patience is how long a busy store is waited for before it is rewritten all the same.
	Patience time.Duration
}

// DefaultConfig returns the settings for a cluster that begins with one server. Only Dir is left to fill in.
func DefaultConfig() Config {
	return Config{
		MemberName: "kedge",
		Tick:       100 * time.Millisecond,
		Election:   time.Second,
		Alone: Pace{
			BatchInterval:   30 * time.Second,
			BatchLimit:      1000,
			SnapshotCount:   1000,
			SnapshotCatchUp: 500,
		},
		// A member that was away for a while should find in the log what it missed, and not have to copy
		// the whole database.
		Several: Pace{
			BatchInterval:   time.Second,
			BatchLimit:      1000,
			SnapshotCount:   5000,
			SnapshotCatchUp: 2500,
		},
		Defrag: DefragConfig{
			Interval:  time.Minute,
			MinSize:   64 << 20,
			MaxFree:   0.5,
			QuietRate: 2,
			Patience:  time.Hour,
		},
	}
}

// Validate reports everything that is wrong with c, and changes nothing.
func (c Config) Validate() error {
	var problems []error
	require := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}

	require(filepath.IsAbs(c.Dir), "directory %q is not an absolute path", c.Dir)
	require(c.MemberName != "", "member name is empty")
	// etcd counts time in whole milliseconds and elections in whole ticks.
	require(c.Tick >= time.Millisecond && c.Tick%time.Millisecond == 0, "tick %v is not a whole number of milliseconds", c.Tick)
	require(c.Tick <= 0 || c.Election >= 5*c.Tick, "election %v is shorter than five ticks of %v", c.Election, c.Tick)
	require(c.Election <= 50*time.Second, "election %v is longer than 50s", c.Election)
	for _, p := range []Pace{c.Alone, c.Several} {
		require(p.BatchInterval > 0, "batch interval %v is not positive", p.BatchInterval)
		require(p.BatchLimit > 0, "batch limit %d is not positive", p.BatchLimit)
		require(p.SnapshotCount > 0, "snapshot count is zero")
		require(p.SnapshotCatchUp > 0, "snapshot catch-up is zero")
	}
	require(c.Quota >= 0, "quota %d is negative", c.Quota)
	require(c.Defrag.Interval > 0, "defragment interval %v is not positive", c.Defrag.Interval)
	require(c.Defrag.MinSize >= 0, "defragment minimum size %d is negative", c.Defrag.MinSize)
	require(c.Defrag.MaxFree >= 0 && c.Defrag.MaxFree <= 1, "defragment free part %v is not between 0 and 1", c.Defrag.MaxFree)
	require(c.Defrag.QuietRate >= 0, "defragment quiet rate %v is negative", c.Defrag.QuietRate)
	require(c.Defrag.Patience >= 0, "defragment patience %v is negative", c.Defrag.Patience)

	problems = append(problems, c.Peer.validate())
	require(c.Join == nil || c.Peer.enabled(), "a member that joins others needs a peer port")
	require(c.Join == nil || c.Join.valid(), "the admission is incomplete")
	require(c.Join == nil || c.Join.Name == c.MemberName, "the admission is not for this member %q", c.MemberName)

	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("datastore config: %w", err)
	}
	return nil
}
