package datastore

import (
	"context"
	"crypto/rand"
	"expvar"
	"fmt"
	"net/url"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/features"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
)

// walSegment is the size of one file of the write-ahead log. Two are allocated at any time, and on a slow card
// allocating takes as long as writing.
const walSegment = 8 << 20

// setWALSegment sets etcd's package variable once, because stores of one process share it.
var setWALSegment = sync.OnceFunc(func() { wal.SegmentSizeBytes = walSegment })

// soloPeer is the peer address of a cluster's only member. Raft wants one; nobody listens there.
var soloPeer = types.URLs{url.URL{Scheme: "http", Host: "127.0.0.1:2380"}}

// newServer opens what is in the data directory, or creates it, but does not yet start raft.
//
// It uses etcdserver and not etcd's embed package, which would open two listeners.
func newServer(c Config, quota int64, log *zap.Logger) (*etcdserver.EtcdServer, error) {
	setWALSegment()
	server, err := etcdserver.NewServer(config.ServerConfig{
		Name:    c.MemberName,
		DataDir: c.Dir,
		Logger:  log,

		// Read when the directory is empty, and else ignored. The token makes the identity of every cluster
		// its own, so that members of two can never take each other for peers.
		NewCluster:          true,
		InitialPeerURLsMap:  types.URLsMap{c.MemberName: soloPeer},
		InitialClusterToken: rand.Text(),
		PeerURLs:            soloPeer,

		TickMs:                     uint(c.Tick.Milliseconds()),
		ElectionTicks:              int(c.Election / c.Tick),
		InitialElectionTickAdvance: true,
		PreVote:                    true,
		StrictReconfigCheck:        true,
		MaxLearners:                1,

		BackendBatchInterval: c.BatchInterval,
		BackendBatchLimit:    c.BatchLimit,
		BackendFreelistType:  bbolt.FreelistMapType,
		QuotaBackendBytes:    quota,

		SnapshotCount:          c.SnapshotCount,
		SnapshotCatchUpEntries: c.SnapshotCatchUp,
		MaxSnapFiles:           5,
		MaxWALFiles:            5,

		// etcd's defaults, which Kubernetes is tested with.
		MaxRequestBytes:             1536 << 10,
		MaxTxnOps:                   128,
		WarningApplyDuration:        slowApply,
		WarningUnaryRequestDuration: slowApply,
		BcryptCost:                  10,
		V2Deprecation:               config.V2DeprDefault,

		// The API server compacts. Two who do would undo each other's promises to clients that page.
		AutoCompactionRetention: 0,
		// Off, as there are no users: AuthToken "". There is nothing to downgrade to: DowngradeCheckTime 0.

		ServerFeatureGate: features.NewDefaultServerFeatureGate(c.MemberName, log),
	})
	if err != nil {
		return nil, fmt.Errorf("open etcd: %w", err)
	}
	return server, nil
}

// campaignInterval is how often campaign looks whether it is time.
const campaignInterval = 2 * time.Millisecond

// campaign makes the only member of a cluster stand for election as soon as it can, and returns when there is
// a leader or ctx has ended.
//
// Left alone, raft waits for an election timeout, in case there is a leader to be heard from. A short timeout
// makes that wait short, but ticks of 10 ms keep an idle machine busy for nothing, and every member that joins
// later would have to change its timing. So the timing is that of a cluster from the first start, and the
// member sends itself the message with which a retiring leader names its successor. An election is safe at any
// time; here it has one voter.
func campaign(ctx context.Context, server *etcdserver.EtcdServer) {
	ticker := time.NewTicker(campaignInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if uint64(server.Leader()) != raft.None {
			return
		}
		self := uint64(server.MemberID())
		if members := server.Cluster().Members(); len(members) != 1 || uint64(members[0].ID) != self {
			continue // not known yet, or not alone
		}
		if !applied(self) {
			continue
		}
		// An error means that the server stops.
		_ = server.Process(ctx, &raftpb.Message{Type: raftpb.MsgTimeoutNow.Enum(), From: &self, To: &self})
	}
}

// applied reports whether raft knows that everything committed is applied. Until then it must not be told to
// stand for election: it would look through its log for changes of membership, of which etcd may have dropped
// the beginning, and panic. Once it is so it stays so, because without a leader nothing is committed.
//
// It is raft's own view that counts, which lags behind etcd's, and etcd publishes it as a debug variable only:
// that of the last member started in this process. Members of other stores of the process, if there are any,
// wait for the election timeout.
func applied(self uint64) bool {
	published, ok := expvar.Get("raft.status").(expvar.Func)
	if !ok {
		return false
	}
	status, ok := published.Value().(raft.Status)
	return ok && status.ID == self && status.Applied == status.HardState.GetCommit()
}
