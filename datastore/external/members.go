package external

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kedge/datastore"
)

// Members returns the servers of the cluster.
func (s *Store) Members(ctx context.Context) ([]datastore.Member, error) {
	v, err := s.ask(ctx)
	if err != nil {
		return nil, err
	}
	s.note(v)
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []datastore.Member
	for name, r := range v.servers {
		_, alive := v.alive[name]
		all = append(all, datastore.Member{
			Name: name, Addresses: r.Addresses, Self: name == s.self.Name, Leader: v.leader != nil && string(v.leader.Value) == name,
			Started: len(r.Addresses) > 0, Reachable: alive, LastSeen: s.seen[name],
		})
	}
	slices.SortFunc(all, func(a, b datastore.Member) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// ask reads the keys of the servers for a caller of another component.
func (s *Store) ask(ctx context.Context) (view, error) {
	if !s.serving.Load() {
		return view{}, datastore.ErrNotServing
	}
	ctx, cancel := context.WithTimeout(ctx, s.times.answer)
	defer cancel()
	return s.look(ctx)
}

// AdmitWitness returns an error: the external etcd has members of its own.
func (s *Store) AdmitWitness(_ context.Context, name string, _ []netip.AddrPort) (datastore.Admission, error) {
	return datastore.Admission{}, fmt.Errorf("admit %s: a cluster with an external etcd has no witness", name)
}

// Admit lets another server take part in the etcd. Its addresses are known when it has started.
func (s *Store) Admit(ctx context.Context, name string, _ []netip.AddrPort) (datastore.Admission, error) {
	v, err := s.ask(ctx)
	if err != nil {
		return datastore.Admission{}, err
	}
	if _, alive := v.alive[name]; alive {
		return datastore.Admission{}, fmt.Errorf("admit %s: %w", name, datastore.ErrMemberExists)
	}
	if _, listed := v.servers[name]; !listed {
		resp, err := s.client.Txn(ctx).If(clientv3.Compare(clientv3.Value(clusterKey), "=", s.self.Cluster)).
			Then(clientv3.OpPut(serverPrefix+name, "{}")).Commit()
		if err == nil && !resp.Succeeded {
			err = errLost
		}
		if err != nil {
			return datastore.Admission{}, fmt.Errorf("admit %s: %w", name, err)
		}
	}
	return datastore.Admission{External: true, Name: name}, nil
}

// Remove removes a server, which stops when it sees that.
func (s *Store) Remove(ctx context.Context, name string) error {
	v, err := s.ask(ctx)
	if err != nil {
		return err
	}
	if _, listed := v.servers[name]; !listed {
		return fmt.Errorf("remove %s: %w", name, datastore.ErrNoMember)
	}
	if len(v.servers) == 1 {
		return fmt.Errorf("%s is the only server of the cluster; stop it with \"kedge uninstall\", or its service", name)
	}
	changes := []clientv3.Op{clientv3.OpDelete(serverPrefix + name), clientv3.OpDelete(alivePrefix + name)}
	if v.leader != nil && string(v.leader.Value) == name {
		// Another server leads before the lease ends. The removed one stops by the same change.
		changes = append(changes, clientv3.OpDelete(leaderKey))
	}
	if _, err := s.client.Txn(ctx).Then(changes...).Commit(); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}
