package datastore

import "go.uber.org/zap/zapcore"

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
}

// quietCore is a zapcore.Core that keeps the expected out of sight.
type quietCore struct{ zapcore.Core }

func newQuietCore(core zapcore.Core) zapcore.Core { return quietCore{core} }

func (c quietCore) With(fields []zapcore.Field) zapcore.Core {
	return quietCore{c.Core.With(fields)}
}

func (c quietCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if expected[entry.Message] {
		entry.Level = zapcore.InfoLevel // which is debug to us
	}
	return c.Core.Check(entry, checked)
}
