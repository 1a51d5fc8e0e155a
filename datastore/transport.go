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

// transport connects etcd's clients with etcd's server by function calls to the services that would otherwise listen on a
// socket. All clients share it, and it holds no state of any of them.
type transport struct {
	gate   *gate
	disk   *diskSpace
	guards *putGuard // nil: none
	fail   func(error)
	server *etcdserver.EtcdServer

	kv          pb.KVServer
	lease       pb.LeaseServer
	watch       pb.WatchServer
	cluster     pb.ClusterServer
	maintenance pb.MaintenanceServer
}

func newTransport(server *etcdserver.EtcdServer, g *gate, d *diskSpace, guards *putGuard, fail func(error)) *transport {
	return &transport{
		guards:  guards,
		disk:    d,
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

// defragmenter replaces etcd's handler of Defragment, which notifies a gRPC health service. There is no such service here,
// and the type of its notifier is private, so the handler cannot be given a dummy.
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

// guard runs f, and fails the store if f panics. Over gRPC a panic would end the process. Here the API server's handlers
// would recover it and go on, with a store whose locks may still be held.
func (t *transport) guard(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			t.fail(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
			err = rpctypes.ErrGRPCStopped
		}
	}()
	return f()
}

// quorumCall makes one call that only a majority of the members can answer.
func quorumCall[Req, Resp any](t *transport, ctx context.Context, in *Req, f func(context.Context, *Req) (*Resp, error)) (out *Resp, err error) {
	c, err := t.gate.enterCall(ctx)
	if err != nil {
		return nil, err
	}
	defer c.leaveCall()
	for {
		err = t.guard(func() (err error) {
			out, err = f(c.ctx, in)
			return err
		})
		if !proposalDropped(err) {
			break
		}
		// Raft drops proposals during a transfer of leadership, which takes moments. A dropped proposal is never applied,
		// so it is safe to repeat.
		sleep(c.ctx, proposalRetryInterval)
		if c.ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, c.reason(err)
	}
	return out, nil
}

// proposalRetryInterval is the pause before a proposal that raft has dropped is repeated.
const proposalRetryInterval = 10 * time.Millisecond

// proposalDropped reports whether raft has dropped a proposal. The handlers report that by text only.
func proposalDropped(err error) bool {
	return err != nil && (errors.Is(err, raft.ErrProposalDropped) || status.Convert(err).Message() == raft.ErrProposalDropped.Error())
}

// localCall makes one call, not a stream, that this member answers alone.
func localCall[Req, Resp any](t *transport, ctx context.Context, in *Req, f func(context.Context, *Req) (*Resp, error)) (out *Resp, err error) {
	c, err := t.gate.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer c.leave()
	err = t.guard(func() (err error) {
		out, err = f(c.ctx, in)
		return err
	})
	if err != nil {
		return nil, c.reason(err)
	}
	return out, nil
}

type kvClient struct{ *transport }

var _ pb.KVClient = kvClient{}

func (c kvClient) Range(ctx context.Context, in *pb.RangeRequest, _ ...grpc.CallOption) (*pb.RangeResponse, error) {
	if in.Serializable {
		return localCall(c.transport, ctx, in, c.kv.Range)
	}
	return quorumCall(c.transport, ctx, in, c.kv.Range)
}

func (c kvClient) Put(ctx context.Context, in *pb.PutRequest, _ ...grpc.CallOption) (*pb.PutResponse, error) {
	c.disk.noteWrite(len(in.Value))
	if c.disk.writesRefused.Load() {
		return nil, rpctypes.ErrGRPCNoSpace
	}
	end, err := c.guards.put(in)
	if err != nil {
		return nil, err
	}
	defer end()
	return quorumCall(c.transport, ctx, in, c.kv.Put)
}

func (c kvClient) DeleteRange(ctx context.Context, in *pb.DeleteRangeRequest, _ ...grpc.CallOption) (*pb.DeleteRangeResponse, error) {
	return quorumCall(c.transport, ctx, in, c.kv.DeleteRange)
}

func (c kvClient) Txn(ctx context.Context, in *pb.TxnRequest, _ ...grpc.CallOption) (*pb.TxnResponse, error) {
	c.disk.noteWrite(valueBytes(in))
	if c.disk.writesRefused.Load() && hasPuts(in) {
		// The transaction may still be answered if its comparison fails: for example, that the object exists already.
		if hasPuts(&pb.TxnRequest{Failure: in.Failure}) {
			return nil, rpctypes.ErrGRPCNoSpace
		}
		resp, err := quorumCall(c.transport, ctx, &pb.TxnRequest{Compare: in.Compare, Failure: in.Failure}, c.kv.Txn)
		if err == nil && resp.Succeeded {
			return nil, rpctypes.ErrGRPCNoSpace
		}
		return resp, err
	}
	end, err := c.guards.txn(in)
	if err != nil {
		return nil, err
	}
	defer end()
	return quorumCall(c.transport, ctx, in, c.kv.Txn)
}

func (c kvClient) Compact(ctx context.Context, in *pb.CompactionRequest, _ ...grpc.CallOption) (*pb.CompactionResponse, error) {
	return quorumCall(c.transport, ctx, in, c.kv.Compact)
}

func (c kvClient) RangeStream(ctx context.Context, in *pb.RangeRequest, _ ...grpc.CallOption) (pb.KV_RangeStreamClient, error) {
	return openStream(c.gate, ctx, c.guard, func(s *serverStream[pb.RangeRequest, pb.RangeStreamResponse]) error {
		return c.kv.RangeStream(in, rangeStream{s})
	})
}

// rangeStream gives every chunk a copy of its list. etcd reads the list again after it has sent it, while the API server
// already clears the elements that it has read, to free memory early.
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
	return quorumCall(c.transport, ctx, in, c.lease.LeaseGrant)
}

func (c leaseClient) LeaseRevoke(ctx context.Context, in *pb.LeaseRevokeRequest, _ ...grpc.CallOption) (*pb.LeaseRevokeResponse, error) {
	return quorumCall(c.transport, ctx, in, c.lease.LeaseRevoke)
}

func (c leaseClient) LeaseKeepAlive(ctx context.Context, _ ...grpc.CallOption) (pb.Lease_LeaseKeepAliveClient, error) {
	return openStream(c.gate, ctx, c.guard, func(s *serverStream[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
		return c.lease.LeaseKeepAlive(s)
	})
}

func (c leaseClient) LeaseTimeToLive(ctx context.Context, in *pb.LeaseTimeToLiveRequest, _ ...grpc.CallOption) (*pb.LeaseTimeToLiveResponse, error) {
	return localCall(c.transport, ctx, in, c.lease.LeaseTimeToLive)
}

func (c leaseClient) LeaseLeases(ctx context.Context, in *pb.LeaseLeasesRequest, _ ...grpc.CallOption) (*pb.LeaseLeasesResponse, error) {
	return localCall(c.transport, ctx, in, c.lease.LeaseLeases)
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
	return quorumCall(c.transport, ctx, in, c.cluster.MemberAdd)
}

func (c clusterClient) MemberRemove(ctx context.Context, in *pb.MemberRemoveRequest, _ ...grpc.CallOption) (*pb.MemberRemoveResponse, error) {
	return quorumCall(c.transport, ctx, in, c.cluster.MemberRemove)
}

func (c clusterClient) MemberUpdate(ctx context.Context, in *pb.MemberUpdateRequest, _ ...grpc.CallOption) (*pb.MemberUpdateResponse, error) {
	return quorumCall(c.transport, ctx, in, c.cluster.MemberUpdate)
}

func (c clusterClient) MemberList(ctx context.Context, in *pb.MemberListRequest, _ ...grpc.CallOption) (*pb.MemberListResponse, error) {
	return localCall(c.transport, ctx, in, c.cluster.MemberList)
}

func (c clusterClient) MemberPromote(ctx context.Context, in *pb.MemberPromoteRequest, _ ...grpc.CallOption) (*pb.MemberPromoteResponse, error) {
	return quorumCall(c.transport, ctx, in, c.cluster.MemberPromote)
}

type maintenanceClient struct{ *transport }

var _ pb.MaintenanceClient = maintenanceClient{}

func (c maintenanceClient) Alarm(ctx context.Context, in *pb.AlarmRequest, _ ...grpc.CallOption) (*pb.AlarmResponse, error) {
	return quorumCall(c.transport, ctx, in, c.maintenance.Alarm)
}

func (c maintenanceClient) Status(ctx context.Context, in *pb.StatusRequest, _ ...grpc.CallOption) (*pb.StatusResponse, error) {
	return localCall(c.transport, ctx, in, c.maintenance.Status)
}

func (c maintenanceClient) Defragment(ctx context.Context, in *pb.DefragmentRequest, _ ...grpc.CallOption) (*pb.DefragmentResponse, error) {
	return localCall(c.transport, ctx, in, c.maintenance.Defragment)
}

func (c maintenanceClient) Hash(ctx context.Context, in *pb.HashRequest, _ ...grpc.CallOption) (*pb.HashResponse, error) {
	return localCall(c.transport, ctx, in, c.maintenance.Hash)
}

func (c maintenanceClient) HashKV(ctx context.Context, in *pb.HashKVRequest, _ ...grpc.CallOption) (*pb.HashKVResponse, error) {
	return localCall(c.transport, ctx, in, c.maintenance.HashKV)
}

func (c maintenanceClient) Snapshot(ctx context.Context, in *pb.SnapshotRequest, _ ...grpc.CallOption) (pb.Maintenance_SnapshotClient, error) {
	return openStream(c.gate, ctx, c.guard, func(s *serverStream[pb.SnapshotRequest, pb.SnapshotResponse]) error {
		return c.maintenance.Snapshot(in, s)
	})
}

func (c maintenanceClient) MoveLeader(ctx context.Context, in *pb.MoveLeaderRequest, _ ...grpc.CallOption) (*pb.MoveLeaderResponse, error) {
	return localCall(c.transport, ctx, in, c.maintenance.MoveLeader)
}

func (c maintenanceClient) Downgrade(ctx context.Context, in *pb.DowngradeRequest, _ ...grpc.CallOption) (*pb.DowngradeResponse, error) {
	return localCall(c.transport, ctx, in, c.maintenance.Downgrade)
}
