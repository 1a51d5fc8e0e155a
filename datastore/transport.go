package datastore

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"go.etcd.io/raft/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// transport is what lies between etcd's client and etcd's server: plain function calls to the services that
// would otherwise answer on a socket. It is shared by all clients and holds nothing of any of them.
type transport struct {
	gate   *gate
	fail   func(error)
	server *etcdserver.EtcdServer

	kv          pb.KVServer
	lease       pb.LeaseServer
	watch       pb.WatchServer
	cluster     pb.ClusterServer
	maintenance pb.MaintenanceServer
}

func newTransport(server *etcdserver.EtcdServer, g *gate, fail func(error)) *transport {
	return &transport{
		gate:    g,
		fail:    fail,
		server:  server,
		kv:      v3rpc.NewQuotaKVServer(server),
		lease:   v3rpc.NewQuotaLeaseServer(server),
		watch:   v3rpc.NewWatchServer(server),
		cluster: v3rpc.NewClusterServer(server),
		maintenance: defragmenter{
			MaintenanceServer: v3rpc.NewMaintenanceServer(server, nil),
			server:            server,
		},
	}
}

// defragmenter defragments without telling a gRPC health service that it does: there is none, and etcd's own
// handler calls it unasked. The type of that service's notifier is private, so it cannot be given a dummy.
type defragmenter struct {
	pb.MaintenanceServer
	server *etcdserver.EtcdServer
}

func (d defragmenter) Defragment(context.Context, *pb.DefragmentRequest) (*pb.DefragmentResponse, error) {
	if err := d.server.Defragment(); err != nil {
		return nil, fmt.Errorf("defragment: %w", err)
	}
	return &pb.DefragmentResponse{}, nil
}

// guard runs f, and fails the store if f panics. Over gRPC that would end the process. Here the API server's
// own handlers would recover, and go on beside a store that may have been left with its locks held.
func (t *transport) guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			t.fail(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
			err = rpctypes.ErrGRPCStopped
		}
	}()
	return f()
}

// majority makes one call that cannot be answered without a majority of the members.
func majority[Req, Resp any](t *transport, ctx context.Context, in *Req, f func(context.Context, *Req) (*Resp, error)) (out *Resp, err error) {
	a, err := t.gate.enterCall(ctx)
	if err != nil {
		return nil, err
	}
	defer a.leaveCall()
	for {
		err = t.guard(func() (err error) {
			out, err = f(a.ctx, in)
			return err
		})
		if !dropped(err) {
			break
		}
		// Raft takes nothing while it hands its leadership over. This has not happened and will not, so it is
		// safe to ask again, and it is over in a moment.
		sleep(a.ctx, retryDropped)
		if a.ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, a.reason(err)
	}
	return out, nil
}

// retryDropped is after how long a proposal is made again that raft did not take.
const retryDropped = 10 * time.Millisecond

// dropped reports whether raft has not taken a proposal, which the handlers do not say by a type.
func dropped(err error) bool {
	return err != nil && (errors.Is(err, raft.ErrProposalDropped) || status.Convert(err).Message() == raft.ErrProposalDropped.Error())
}

// call makes one call that this member answers alone, and that is not a stream.
func call[Req, Resp any](t *transport, ctx context.Context, in *Req, f func(context.Context, *Req) (*Resp, error)) (out *Resp, err error) {
	a, err := t.gate.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer a.leave()
	err = t.guard(func() (err error) {
		out, err = f(a.ctx, in)
		return err
	})
	if err != nil {
		return nil, a.reason(err)
	}
	return out, nil
}

type kvClient struct{ *transport }

var _ pb.KVClient = kvClient{}

func (c kvClient) Range(ctx context.Context, in *pb.RangeRequest, _ ...grpc.CallOption) (*pb.RangeResponse, error) {
	if in.Serializable {
		return call(c.transport, ctx, in, c.kv.Range)
	}
	return majority(c.transport, ctx, in, c.kv.Range)
}

func (c kvClient) Put(ctx context.Context, in *pb.PutRequest, _ ...grpc.CallOption) (*pb.PutResponse, error) {
	return majority(c.transport, ctx, in, c.kv.Put)
}

func (c kvClient) DeleteRange(ctx context.Context, in *pb.DeleteRangeRequest, _ ...grpc.CallOption) (*pb.DeleteRangeResponse, error) {
	return majority(c.transport, ctx, in, c.kv.DeleteRange)
}

func (c kvClient) Txn(ctx context.Context, in *pb.TxnRequest, _ ...grpc.CallOption) (*pb.TxnResponse, error) {
	return majority(c.transport, ctx, in, c.kv.Txn)
}

func (c kvClient) Compact(ctx context.Context, in *pb.CompactionRequest, _ ...grpc.CallOption) (*pb.CompactionResponse, error) {
	return majority(c.transport, ctx, in, c.kv.Compact)
}

func (c kvClient) RangeStream(ctx context.Context, in *pb.RangeRequest, _ ...grpc.CallOption) (pb.KV_RangeStreamClient, error) {
	return openStream(c.gate, ctx, c.guard, func(s *serverStream[pb.RangeRequest, pb.RangeStreamResponse]) error {
		return c.kv.RangeStream(in, rangeStream{s})
	})
}

// rangeStream gives every chunk a list of its own. etcd measures the list again after it was sent, while the API
// server, to free memory early, already clears the elements that it has read.
type rangeStream struct {
	*serverStream[pb.RangeRequest, pb.RangeStreamResponse]
}

func (s rangeStream) Send(m *pb.RangeStreamResponse) error {
	m.RangeResponse.Kvs = slices.Clone(m.RangeResponse.Kvs)
	return s.serverStream.Send(m)
}

type leaseClient struct{ *transport }

var _ pb.LeaseClient = leaseClient{}

func (c leaseClient) LeaseGrant(ctx context.Context, in *pb.LeaseGrantRequest, _ ...grpc.CallOption) (*pb.LeaseGrantResponse, error) {
	return majority(c.transport, ctx, in, c.lease.LeaseGrant)
}

func (c leaseClient) LeaseRevoke(ctx context.Context, in *pb.LeaseRevokeRequest, _ ...grpc.CallOption) (*pb.LeaseRevokeResponse, error) {
	return majority(c.transport, ctx, in, c.lease.LeaseRevoke)
}

func (c leaseClient) LeaseKeepAlive(ctx context.Context, _ ...grpc.CallOption) (pb.Lease_LeaseKeepAliveClient, error) {
	return openStream(c.gate, ctx, c.guard, func(s *serverStream[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
		return c.lease.LeaseKeepAlive(s)
	})
}

func (c leaseClient) LeaseTimeToLive(ctx context.Context, in *pb.LeaseTimeToLiveRequest, _ ...grpc.CallOption) (*pb.LeaseTimeToLiveResponse, error) {
	return call(c.transport, ctx, in, c.lease.LeaseTimeToLive)
}

func (c leaseClient) LeaseLeases(ctx context.Context, in *pb.LeaseLeasesRequest, _ ...grpc.CallOption) (*pb.LeaseLeasesResponse, error) {
	return call(c.transport, ctx, in, c.lease.LeaseLeases)
}

type watchClient struct{ *transport }

var _ pb.WatchClient = watchClient{}

func (c watchClient) Watch(ctx context.Context, _ ...grpc.CallOption) (pb.Watch_WatchClient, error) {
	return openStream(c.gate, ctx, c.guard, func(s *serverStream[pb.WatchRequest, pb.WatchResponse]) error {
		return c.watch.Watch(s)
	})
}

type clusterClient struct{ *transport }

var _ pb.ClusterClient = clusterClient{}

func (c clusterClient) MemberAdd(ctx context.Context, in *pb.MemberAddRequest, _ ...grpc.CallOption) (*pb.MemberAddResponse, error) {
	return majority(c.transport, ctx, in, c.cluster.MemberAdd)
}

func (c clusterClient) MemberRemove(ctx context.Context, in *pb.MemberRemoveRequest, _ ...grpc.CallOption) (*pb.MemberRemoveResponse, error) {
	return majority(c.transport, ctx, in, c.cluster.MemberRemove)
}

func (c clusterClient) MemberUpdate(ctx context.Context, in *pb.MemberUpdateRequest, _ ...grpc.CallOption) (*pb.MemberUpdateResponse, error) {
	return majority(c.transport, ctx, in, c.cluster.MemberUpdate)
}

func (c clusterClient) MemberList(ctx context.Context, in *pb.MemberListRequest, _ ...grpc.CallOption) (*pb.MemberListResponse, error) {
	return call(c.transport, ctx, in, c.cluster.MemberList)
}

func (c clusterClient) MemberPromote(ctx context.Context, in *pb.MemberPromoteRequest, _ ...grpc.CallOption) (*pb.MemberPromoteResponse, error) {
	return majority(c.transport, ctx, in, c.cluster.MemberPromote)
}

type maintenanceClient struct{ *transport }

var _ pb.MaintenanceClient = maintenanceClient{}

func (c maintenanceClient) Alarm(ctx context.Context, in *pb.AlarmRequest, _ ...grpc.CallOption) (*pb.AlarmResponse, error) {
	return majority(c.transport, ctx, in, c.maintenance.Alarm)
}

func (c maintenanceClient) Status(ctx context.Context, in *pb.StatusRequest, _ ...grpc.CallOption) (*pb.StatusResponse, error) {
	return call(c.transport, ctx, in, c.maintenance.Status)
}

func (c maintenanceClient) Defragment(ctx context.Context, in *pb.DefragmentRequest, _ ...grpc.CallOption) (*pb.DefragmentResponse, error) {
	return call(c.transport, ctx, in, c.maintenance.Defragment)
}

func (c maintenanceClient) Hash(ctx context.Context, in *pb.HashRequest, _ ...grpc.CallOption) (*pb.HashResponse, error) {
	return call(c.transport, ctx, in, c.maintenance.Hash)
}

func (c maintenanceClient) HashKV(ctx context.Context, in *pb.HashKVRequest, _ ...grpc.CallOption) (*pb.HashKVResponse, error) {
	return call(c.transport, ctx, in, c.maintenance.HashKV)
}

func (c maintenanceClient) Snapshot(ctx context.Context, in *pb.SnapshotRequest, _ ...grpc.CallOption) (pb.Maintenance_SnapshotClient, error) {
	return openStream(c.gate, ctx, c.guard, func(s *serverStream[pb.SnapshotRequest, pb.SnapshotResponse]) error {
		return c.maintenance.Snapshot(in, s)
	})
}

func (c maintenanceClient) MoveLeader(ctx context.Context, in *pb.MoveLeaderRequest, _ ...grpc.CallOption) (*pb.MoveLeaderResponse, error) {
	return call(c.transport, ctx, in, c.maintenance.MoveLeader)
}

func (c maintenanceClient) Downgrade(ctx context.Context, in *pb.DowngradeRequest, _ ...grpc.CallOption) (*pb.DowngradeResponse, error) {
	return call(c.transport, ctx, in, c.maintenance.Downgrade)
}
