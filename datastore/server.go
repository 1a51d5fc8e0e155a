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
)

// walSegment is the size of one file of the write-ahead log. Two are allocated at any time, and on a slow card
// allocating takes as long as writing.
const walSegment = 8 << 20

// setWALSegment sets etcd's package variable once, because stores of one process share it.
var setWALSegment = sync.OnceFunc(func() { wal.SegmentSizeBytes = walSegment })

// maxLearners bounds the members that have no vote yet. All members must agree on it. More than one lets several
// join at a time, and one that never comes does not stand in their way.
const maxLearners = 8

// opening is how the store is opened.
type opening struct {
	// self is this member's URL, and members are all members' by their names. Read when the directory is empty,
	// and else ignored.
	self    types.URLs
	members types.URLsMap
	// join is for a directory that is empty, and a cluster that exists.
	join bool
	// several says that there are, or will at once be, other members.
	several bool
	quota   int64
}

// newServer opens what is in the data directory, or creates it, but does not yet start raft.
//
// It uses etcdserver and not etcd's embed package, which would open two listeners.
func newServer(c Config, o opening, log *zap.Logger) (*etcdserver.EtcdServer, error) {
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

		// The token makes the identity of every cluster its own, so that members of two can never take each
		// other for peers.
		NewCluster:          !o.join,
		InitialPeerURLsMap:  o.members,
		InitialClusterToken: rand.Text(),
		PeerURLs:            o.self,
		PeerTLSInfo:         c.Peer.tlsInfo(o.self),

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

		CompactHashCheckTime: time.Minute,
		ServerFeatureGate:    gates,
	})
	if err != nil {
		return nil, fmt.Errorf("open etcd: %w", err)
	}
	return server, nil
}

// featureGates turns etcd's comparisons of the members' data on where there are several.
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

// tlsInfo is for raft's connections to other members, which go out from the member's own address on loopback.
func (p PeerConfig) tlsInfo(self types.URLs) etcdtls.TLSInfo {
	if !p.enabled() {
		return etcdtls.TLSInfo{}
	}
	info := etcdtls.TLSInfo{
		CertFile: p.CertFile, KeyFile: p.KeyFile, TrustedCAFile: p.CAFile, ClientCertAuth: true,
		ServerName: PeerServerName, MinVersion: tls.VersionTLS13,
	}
	if a := virtualAddress(self[0].String()); a.IsValid() {
		info.LocalAddr = a.String()
	}
	return info
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
