package datastore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Endpoint is the address of the store in this process, for the API server's list of etcd servers. It is never dialled.
const Endpoint = "http://datastore.kedge.invalid:2379"

// keepAliveTimeout bounds the wait for the answer to the first keep-alive of a lease.
const keepAliveTimeout = time.Second

// NewClient returns a client of the store, which works while the store serves. The caller closes it.
//
// Each call returns a client that shares nothing with the others. The API server closes the client of a resource type
// when the type is removed, which ends all watches and leases of that client; and it wraps the client's KV in place. Close
// returns an error, as it does for every client whose connection was closed before; callers ignore it.
func (s *Store) NewClient() (*kubernetes.Client, error) {
	t := s.transport.Load()
	if t == nil {
		return nil, ErrNotServing
	}
	// Only clientv3.New sets endpoints. Without them the API server concludes that the store cannot report watch progress,
	// and stops serving consistent lists from its caches.
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{Endpoint},
		Logger:    s.zap,
		DialOptions: []grpc.DialOption{
			grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, errNoNetwork }),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("new client: %w", err)
	}
	// The client's own connection is not used. Closing it frees its goroutine and half of the client's memory, and makes
	// calls of a service that is not replaced below fail instead of wait.
	_ = c.ActiveConnection().Close()

	c.KV = clientv3.NewKVFromKVClient(kvClient{t}, c)
	c.Lease = clientv3.NewLeaseFromLeaseClient(leaseClient{t}, c, keepAliveTimeout)
	c.Watcher = clientv3.NewWatchFromWatchClient(watchClient{t}, c)
	c.Cluster = clientv3.NewClusterFromClusterClient(clusterClient{t}, c)
	c.Maintenance = clientv3.NewMaintenanceFromMaintenanceClient(maintenanceClient{t}, c)
	c.Auth = clientv3.NewAuthFromAuthClient(pb.NewAuthClient(noConn{}), c)

	k := &kubernetes.Client{Client: c}
	k.Kubernetes = k
	return k, nil
}

// noConn replaces the connection of the auth service, which the store does not have, because it has no users.
type noConn struct{}

func (noConn) Invoke(_ context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	return status.Errorf(codes.Unimplemented, "the datastore has no %s", method)
}

func (noConn) NewStream(_ context.Context, _ *grpc.StreamDesc, method string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, status.Errorf(codes.Unimplemented, "the datastore has no %s", method)
}

var errNoNetwork = errors.New("the datastore is not on a network")
