package datastore

import (
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// Config holds the settings of a Store. Every write is on disk before it is acknowledged; there is deliberately no setting
// for that.
type Config struct {
	// Dir is the absolute path of the store's directory, which nothing else uses. It is created if missing.
	Dir string

	// MemberName is the name of this member, unique among the servers of the cluster.
	MemberName string

	// Peer says how this member and the others reach each other. It may be empty if the store stays alone.
	Peer PeerConfig

	// Join is the admission with which a new member starts for the first time. It is ignored if the directory holds a
	// store already.
	Join *Admission

	// Witness says that this member votes and keeps the data on a machine without an API server. Whenever it becomes the
	// leader, which raft cannot prevent, it hands the leadership over to a member that is none.
	Witness bool

	// Tick is raft's unit of time, and Election the time without a leader after which a follower stands for election. All
	// members of a cluster must agree on both.
	Tick, Election time.Duration

	// Alone applies to a store with one member, Several to one with more. A member chooses at its start, so the first
	// member of a cluster uses Alone until it starts again. Members need not agree.
	Alone, Several Pace

	// Quota is the size of the database file above which writes are refused. Zero means a quarter of the volume, at most
	// 2 GiB.
	Quota int64

	Defrag DefragConfig
}

// Pace says how many changes wait in memory before they are written in bulk. Waiting is safe, because the write-ahead log
// holds all of them.
type Pace struct {
	// BatchInterval and BatchLimit bound the time and the number of changes that wait in memory before they are committed
	// to the database file. The limit also bounds the buffer that every read copies.
	BatchInterval time.Duration
	BatchLimit    int

	// SnapshotCount is the number of raft entries after which the log is truncated, and SnapshotCatchUp the number of
	// older entries that are kept for members that lag. All of them are held in memory.
	SnapshotCount, SnapshotCatchUp uint64
}

// DefragConfig says when the database is defragmented, which rewrites the file to return space to the file system. Reads
// and writes stop meanwhile, so it waits for a quiet moment.
type DefragConfig struct {
	// Interval is the interval at which the size is checked and the write rate is measured.
	Interval time.Duration
	// MinSize is the file size up to which the database is not defragmented.
	MinSize int64
	// MaxFree is the fraction of the file that may be unused, from 0 to 1.
	MaxFree float64
	// QuietRate is the number of raft entries per second up to which the store counts as quiet.
	QuietRate float64
	// Patience is the time after which a busy store is defragmented all the same.
	Patience time.Duration
}

// DefaultConfig returns the default settings, without Dir.
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
		// A member that was away for a while should catch up from the log, without a copy of the whole database.
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

// Validate reports all mistakes in c at once.
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

	problems = append(problems, c.Peer.Validate())
	require(c.Join == nil || c.Peer.Enabled(), "a member that joins others needs a peer port")
	require(c.Join == nil || c.Join.valid(), "the admission is incomplete")
	require(c.Join == nil || c.Join.Name == c.MemberName, "the admission is not for this member %q", c.MemberName)

	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("datastore config: %w", err)
	}
	return nil
}
