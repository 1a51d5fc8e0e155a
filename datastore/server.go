package datastore

import (
	"crypto/rand"
	"fmt"
	"net/url"
	"sync"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/features"
	"go.etcd.io/etcd/server/v3/storage/wal"
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
