package external

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"kedge/datastore"
	"kedge/internal/errorkind"
)

// The keys of the servers; see the package comment.
const (
	prefix       = "/kedge/"
	clusterKey   = prefix + "cluster"
	serverPrefix = prefix + "servers/"
	alivePrefix  = prefix + "alive/"
	leaderKey    = prefix + "leader"
	// objectPrefix is where the API server keeps its objects.
	objectPrefix = "/registry/"
)

// record is the value of a server's key.
type record struct {
	Addresses []netip.AddrPort `json:"addresses,omitempty"` // of its API
}

// view is what the etcd says of the servers at one revision.
type view struct {
	cluster string
	servers map[string]record
	alive   map[string]clientv3.LeaseID
	leader  *mvccpb.KeyValue // nil: none
}

func viewOf(kvs []*mvccpb.KeyValue) view {
	v := view{servers: map[string]record{}, alive: map[string]clientv3.LeaseID{}}
	for _, kv := range kvs {
		key := string(kv.Key)
		switch name, isServer := strings.CutPrefix(key, serverPrefix); {
		case key == clusterKey:
			v.cluster = string(kv.Value)
		case key == leaderKey:
			v.leader = kv
		case isServer:
			var r record
			_ = json.Unmarshal(kv.Value, &r) // without addresses; the server writes them anew
			v.servers[name] = r
		case strings.HasPrefix(key, alivePrefix):
			v.alive[strings.TrimPrefix(key, alivePrefix)] = clientv3.LeaseID(kv.Lease)
		}
	}
	return v
}

// look reads the keys of the servers.
func (s *Store) look(ctx context.Context) (view, error) {
	resp, err := s.client.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return view{}, explain(s.cfg.String(), err)
	}
	return viewOf(resp.Kvs), nil
}

// enter makes this server one of the cluster in the etcd, or finds that it is one. The first server of a cluster takes an etcd that
// holds nothing; every other one was admitted.
func (s *Store) enter(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	if !s.self.Known {
		value, err := json.Marshal(s.record())
		if err != nil {
			return err
		}
		resp, err := s.client.Txn(ctx).If(
			clientv3.Compare(clientv3.CreateRevision(clusterKey), "=", 0),
			clientv3.Compare(clientv3.CreateRevision(objectPrefix).WithPrefix(), "=", 0),
		).Then(
			clientv3.OpPut(clusterKey, s.self.Cluster), clientv3.OpPut(serverPrefix+s.self.Name, string(value)),
		).Commit()
		if err != nil {
			return explain(s.cfg.String(), err)
		}
		if resp.Succeeded {
			return s.entered()
		}
	}
	v, err := s.look(ctx)
	if err != nil {
		return err
	}
	if err := s.belongs(v); err != nil {
		return err
	}
	return s.entered()
}

func (s *Store) entered() error {
	if s.onEntered == nil {
		return nil
	}
	return s.onEntered()
}

// Errors of an etcd that this server must not use.
var (
	errOtherCluster = errors.New("the external etcd holds another cluster")
	errLost         = errors.New("the external etcd does not hold this server's cluster any more")
)

// belongs returns an error if this server is not one of the cluster in the etcd.
func (s *Store) belongs(v view) error {
	_, listed := v.servers[s.self.Name]
	switch {
	case v.cluster == "" && !s.self.Known:
		return errorkind.Permanent(fmt.Errorf("%w: it has objects below %s that kedge has not written; give kedge an etcd of its own", errOtherCluster, objectPrefix))
	case v.cluster == "":
		return errorkind.Permanent(fmt.Errorf("%w: it is empty; check --%s, or restore a backup of the etcd; pods go on as they are meanwhile", errLost, settingEndpoint))
	case v.cluster != s.self.Cluster:
		return errorkind.Permanent(fmt.Errorf("%w of kedge, whose keys this server does not have; to become a server of it, start with an empty data directory, --server and --token; otherwise give this one an etcd of its own", errOtherCluster))
	case !listed:
		if s.onRemoved != nil {
			return errors.Join(datastore.ErrRemoved, s.onRemoved())
		}
		return datastore.ErrRemoved
	}
	return nil
}

// record returns what this server says of itself.
func (s *Store) record() record {
	s.mu.Lock()
	defer s.mu.Unlock()
	var r record
	for _, a := range s.addresses {
		r.Addresses = append(r.Addresses, netip.AddrPortFrom(a, s.self.Port))
	}
	return r
}

// take renews the lease, follows the other servers and leads them if no other does, until ctx ends or this server has no place in
// the cluster any more.
func (s *Store) take(ctx context.Context) error {
	watching, end := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.watch(watching)
	}()
	defer func() {
		end()
		<-ended
		s.leave(ctx)
	}()
	failed, told := 0, false
	for {
		err := s.step(ctx)
		if ctx.Err() != nil {
			return nil
		}
		pause := s.times.renew
		switch {
		case errors.Is(err, datastore.ErrRemoved) || errors.Is(err, errLost) || errors.Is(err, errOtherCluster):
			return err
		case err != nil:
			pause = s.times.retry
			if failed++; failed == 2 { // one request may be late on a busy machine
				s.log.Warn("the external etcd does not answer; trying again", "err", err)
				told = true
			}
		case told:
			s.log.Info("the external etcd answers again")
		}
		if err == nil {
			failed, told = 0, false
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
		case <-time.After(pause):
		}
		if err != nil {
			sleep(ctx, s.times.retry) // a wake-up in a row of failures
		}
	}
}

func (s *Store) until() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deadline
}

// expire publishes that there is no leader once the lease cannot be trusted any more.
func (s *Store) expire() {
	if !time.Now().Before(s.until()) {
		s.leaders.Set(datastore.Leadership{})
	}
}

// step renews the lease once, and publishes the leader.
func (s *Store) step(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.times.answer)
	defer cancel()
	lease, err := s.renew(ctx)
	if err != nil {
		return err
	}
	v, err := s.look(ctx)
	if err != nil {
		return err
	}
	if v.cluster == "" { // it was there before
		return errorkind.Permanent(fmt.Errorf("%w: it was emptied; restore a backup of the etcd; pods go on as they are meanwhile", errLost))
	}
	if err := s.belongs(v); err != nil {
		return err
	}
	s.note(v)
	if err := s.announce(ctx, v, lease); err != nil {
		return err
	}
	leader := v.leader
	if leader == nil || string(leader.Value) == s.self.Name && clientv3.LeaseID(leader.Lease) != lease {
		if leader, err = s.stand(ctx, leader, lease); err != nil || leader == nil {
			return err
		}
	}
	s.leaders.Set(datastore.Leadership{
		Leader: string(leader.Value), Leading: clientv3.LeaseID(leader.Lease) == lease, Term: uint64(leader.CreateRevision),
	})
	return nil
}

// renew renews the lease, or gets one, and returns it.
func (s *Store) renew(ctx context.Context) (clientv3.LeaseID, error) {
	s.mu.Lock()
	lease := s.lease
	s.mu.Unlock()
	sent := time.Now()
	if lease != 0 {
		left, err := s.keepAlive(ctx, lease)
		if err != nil {
			return 0, explain(s.cfg.String(), err)
		}
		if left > 0 {
			s.trust(lease, sent.Add(left-s.times.margin))
			return lease, nil
		}
		s.trust(0, time.Time{}) // it has ended, and with it the leadership
		s.leaders.Set(datastore.Leadership{})
		sent = time.Now()
	}
	granted, err := s.client.Grant(ctx, int64(s.times.ttl/time.Second))
	if err != nil {
		return 0, explain(s.cfg.String(), err)
	}
	s.trust(granted.ID, sent.Add(time.Duration(granted.TTL)*time.Second-s.times.margin))
	return granted.ID, nil
}

func (s *Store) trust(lease clientv3.LeaseID, until time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lease, s.deadline = lease, until
	if s.expiry != nil {
		s.expiry.Stop()
	}
	// The lease ends by itself, also while a request waits for an answer.
	s.expiry = time.AfterFunc(time.Until(until), s.expire)
}

// keepAlive renews a lease once and returns how long it lives, zero if it has ended. The client's own function does not wait between
// its tries while the etcd is away.
func (s *Store) keepAlive(ctx context.Context, lease clientv3.LeaseID) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewLeaseClient(s.client.ActiveConnection()).LeaseKeepAlive(ctx)
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(lease)}); err != nil {
		_, err = stream.Recv() // which has the reason
		return 0, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	return time.Duration(resp.TTL) * time.Second, nil
}

// announce writes what differs of this server's own keys.
func (s *Store) announce(ctx context.Context, v view, lease clientv3.LeaseID) error {
	own := s.record()
	sameAddresses := slices.Equal(v.servers[s.self.Name].Addresses, own.Addresses)
	if v.alive[s.self.Name] == lease && sameAddresses {
		return nil
	}
	value, err := json.Marshal(own)
	if err != nil {
		return err
	}
	_, err = s.client.Txn(ctx).If(exists(serverPrefix+s.self.Name)).Then(
		clientv3.OpPut(serverPrefix+s.self.Name, string(value)),
		clientv3.OpPut(alivePrefix+s.self.Name, "", clientv3.WithLease(lease)),
	).Commit()
	return explain(s.cfg.String(), err)
}

func exists(key string) clientv3.Cmp { return clientv3.Compare(clientv3.CreateRevision(key), ">", 0) }

// stand makes this server the leader if there is none, or in place of the process that it was before, which has ended: two
// processes cannot have the same data directory. It returns the leader, nil if that cannot be said yet.
func (s *Store) stand(ctx context.Context, before *mvccpb.KeyValue, lease clientv3.LeaseID) (*mvccpb.KeyValue, error) {
	var revision int64
	if before != nil {
		revision = before.ModRevision
	}
	then := []clientv3.Op{clientv3.OpPut(leaderKey, s.self.Name, clientv3.WithLease(lease)), clientv3.OpGet(leaderKey)}
	resp, err := s.client.Txn(ctx).If(
		clientv3.Compare(clientv3.ModRevision(leaderKey), "=", revision), exists(serverPrefix+s.self.Name),
	).Then(then...).Else(clientv3.OpGet(leaderKey)).Commit()
	if err != nil {
		return nil, explain(s.cfg.String(), err)
	}
	found := resp.Responses[len(resp.Responses)-1].GetResponseRange()
	if found == nil || len(found.Kvs) == 0 {
		return nil, nil
	}
	return found.Kvs[0], nil
}

// note remembers when the servers were seen.
func (s *Store) note(v view) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range v.alive {
		s.seen[name] = time.Now()
	}
}

// watch wakes the store when a key of the servers changes.
func (s *Store) watch(ctx context.Context) {
	for ctx.Err() == nil {
		for range s.client.Watch(clientv3.WithRequireLeader(ctx), prefix, clientv3.WithPrefix()) {
			s.wake.Wake()
		}
		sleep(ctx, s.times.retry)
	}
}

// leave ends the lease, so that another server leads at once.
func (s *Store) leave(ctx context.Context) {
	s.mu.Lock()
	lease := s.lease
	s.lease, s.deadline = 0, time.Time{}
	if s.expiry != nil {
		s.expiry.Stop()
	}
	s.mu.Unlock()
	s.leaders.Set(datastore.Leadership{})
	if lease == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.times.answer)
	defer cancel()
	if _, err := s.client.Revoke(ctx, lease); err != nil {
		s.log.Warn("the lease in the external etcd ends only by itself; if this server led, another leads after that", "err", err)
	}
}
