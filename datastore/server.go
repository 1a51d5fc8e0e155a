package datastore

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"expvar"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	etcdtls "go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/pkg/v3/featuregate"
	"go.etcd.io/etcd/server/v3/config"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/features"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/raft/v3"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"kedge/datastore/peers"
)

// walSegment is the size of one file of the write-ahead log. Two are allocated at any time, and on a slow SD card
// allocation takes as long as writing.
const walSegment = 8 << 20

// setWALSegment sets etcd's package variable once, because all stores of a process share it.
var setWALSegment = sync.OnceFunc(func() { wal.SegmentSizeBytes = walSegment })

// maxLearners bounds the members that have no vote yet. All members must agree on it. With more than one, several members
// can join at a time, and a member that never starts does not block the others.
const maxLearners = 8

// openOptions are the parameters with which the store is opened.
type openOptions struct {
	// self is the peer URL of this member, and members are those of all members by name. etcd reads them only if the
	// directory is empty.
	self    types.URLs
	members types.URLsMap
	// join means that the directory is empty and the cluster exists.
	join bool
	// several means that the store has other members, or will have at once.
	several bool
	quota   int64
}

// newServer opens the store in the data directory, or creates it, without starting raft. It uses etcdserver instead of
// etcd's embed package, which would open two listeners.
func newServer(c Config, o openOptions, log *zap.Logger) (*etcdserver.EtcdServer, error) {
	setWALSegment()
	pace := c.Alone
	if o.several {
		pace = c.Several
	}
	gates, err := featureGates(c.MemberName, o.several, log)
	if err != nil {
		return nil, err
	}
	server, err := etcdserver.NewServer(config.ServerConfig{
		Name:    c.MemberName,
		DataDir: c.Dir,
		Logger:  log,

		NewCluster:          !o.join,
		InitialPeerURLsMap:  o.members,
		InitialClusterToken: newClusterToken(),
		PeerURLs:            o.self,
		PeerTLSInfo:         tlsInfo(c.Peer, o.self),

		TickMs:                     uint(c.Tick.Milliseconds()),
		ElectionTicks:              int(c.Election / c.Tick),
		InitialElectionTickAdvance: true,
		PreVote:                    true,
		StrictReconfigCheck:        true,
		MaxLearners:                maxLearners,

		BackendBatchInterval: pace.BatchInterval,
		BackendBatchLimit:    pace.BatchLimit,
		BackendFreelistType:  bbolt.FreelistMapType,
		QuotaBackendBytes:    o.quota,

		SnapshotCount:          pace.SnapshotCount,
		SnapshotCatchUpEntries: pace.SnapshotCatchUp,
		MaxSnapFiles:           5,
		MaxWALFiles:            5,

		// etcd's defaults, with which Kubernetes is tested.
		MaxRequestBytes:             1536 << 10,
		MaxTxnOps:                   128,
		WarningApplyDuration:        slowApply,
		WarningUnaryRequestDuration: slowApply,
		BcryptCost:                  10,
		V2Deprecation:               config.V2DeprDefault,

		// The API server compacts. A second compactor could delete revisions that the first one keeps for clients that
		// page through a list.
		AutoCompactionRetention: 0,
		// AuthToken is empty, because the store has no users. DowngradeCheckTime is 0, because there is no version to
		// downgrade to.

		CompactHashCheckTime: time.Minute,
		ServerFeatureGate:    gates,
	})
	if err != nil {
		return nil, fmt.Errorf("open etcd: %w", err)
	}
	return server, nil
}

// newClusterToken returns a random token. It makes the ID of every cluster unique, so that members of different clusters never
// accept each other as peers.
func newClusterToken() string { return rand.Text() }

// featureGates enables etcd's comparisons of the members' data if there are several members.
func featureGates(name string, several bool, log *zap.Logger) (featuregate.FeatureGate, error) {
	gates := featuregate.New(name, log)
	if err := gates.Add(features.DefaultEtcdServerFeatureGates); err != nil {
		return nil, err
	}
	return gates, gates.SetFromMap(map[string]bool{
		string(features.InitialCorruptCheck): several,
		string(features.CompactHashCheck):    several,
	})
}

// tlsInfo returns the TLS settings of raft's connections to other members, which leave from this member's loopback address.
func tlsInfo(p peers.Config, self types.URLs) etcdtls.TLSInfo {
	if !p.Enabled() {
		return etcdtls.TLSInfo{}
	}
	info := etcdtls.TLSInfo{
		CertFile: p.CertFile, KeyFile: p.KeyFile, TrustedCAFile: p.CAFile, ClientCertAuth: true,
		ServerName: peers.ServerName, MinVersion: tls.VersionTLS13,
	}
	if a := peers.LoopbackAddr(self[0].String()); a.IsValid() {
		info.LocalAddr = a.String()
	}
	return info
}

// campaignInterval is the interval at which campaign checks whether the member can stand for election.
const campaignInterval = 2 * time.Millisecond

// campaign makes the only member of a cluster stand for election as soon as it can, and returns when there is a leader or
// ctx ends.
//
// By itself, raft waits for an election timeout, in case there is a leader. A shorter timeout needs shorter ticks, and
// ticks of 10 ms keep an idle machine busy; members that join later would have to use the same. So the timing is that of a
// cluster from the first start, and the member sends itself MsgTimeoutNow, with which a leader makes its successor stand
// for election. An election is safe at any time; this one has a single voter.
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
			continue // the members are not known yet, or there are others
		}
		if !applied(self) {
			continue
		}
		// An error means that the server is stopping.
		_ = server.Process(ctx, &raftpb.Message{Type: raftpb.MsgTimeoutNow.Enum(), From: &self, To: &self})
	}
}

// applied reports whether raft knows that all committed entries are applied. Before that, raft must not stand for
// election: it would search the unapplied part of its log for changes of the members, of which etcd may have dropped the
// beginning, and panic. Once true it stays true, because nothing is committed without a leader.
//
// Raft's own state counts, which lags behind etcd's. etcd publishes it only as a debug variable, that of the member which
// was started last in this process. If the process has other stores, their members wait for the election timeout.
func applied(self uint64) bool {
	published, ok := expvar.Get("raft.status").(expvar.Func)
	if !ok {
		return false
	}
	status, ok := published.Value().(raft.Status)
	return ok && status.ID == self && status.Applied == status.HardState.GetCommit()
}
