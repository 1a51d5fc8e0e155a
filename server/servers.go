package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"kedge/datastore"
	"kedge/internal/joining"
	"kedge/server/directory"
	"kedge/server/identity"
	"kedge/server/join"
)

// Leading is the condition under which this server runs what must run once in a
// cluster: its member leads the store, so nobody has to elect anybody else.
type Leading struct{ Store *datastore.Store }

// Holds implements lifecycle.Condition.
func (l Leading) Holds() (bool, <-chan struct{}) {
	now, changed := l.Store.Leadership()
	return now.Leading, changed
}

// Servers is what the servers of a cluster have in common: the list of them, the
// members of the store, and the credentials that a new one gets.
type Servers struct {
	dir   string // of this server
	store *datastore.Store
	list  *directory.Directory
	nodes *join.Nodes // set by NewJoin, which comes after
	api   kubernetes.Interface
}

var (
	_ join.Servers      = (*Servers)(nil)
	_ directory.Members = (*Servers)(nil)
)

// Credentials implements join.Servers.
func (s *Servers) Credentials() (joining.Credentials, error) {
	c := joining.Credentials{}
	files, optional := identity.SharedFiles()
	for _, name := range slices.Concat(files, optional) {
		data, err := os.ReadFile(filepath.Join(s.dir, name))
		if slices.Contains(optional, name) && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read the credentials of the servers: %w", err)
		}
		c[name] = data
	}
	return c, nil
}

// URLs implements join.Servers.
func (s *Servers) URLs() []string { return s.list.URLs() }

// Admit implements join.Servers.
func (s *Servers) Admit(ctx context.Context, name string, peers []netip.AddrPort) (json.RawMessage, error) {
	a, err := s.store.Admit(ctx, name, peers)
	if err != nil {
		return nil, err
	}
	return json.Marshal(a)
}

// Members returns the members of the store.
func (s *Servers) Members(ctx context.Context) ([]datastore.Member, error) {
	return s.store.Members(ctx)
}

// Remove takes a server out of the cluster: out of the store first, which refuses when
// those that remain could not decide anything any more; then its node, its entry in the
// list, and its key, so that another machine can have the name. It is idempotent.
func (s *Servers) Remove(ctx context.Context, name string) error {
	if err := s.store.Remove(ctx, name); err != nil {
		all, _ := s.list.Servers()
		if _, listed := all[name]; !listed || !errors.Is(err, datastore.ErrNoMember) {
			return err
		}
		// An earlier removal came as far as the store.
	}
	// When the leader was removed nothing can be written until there is another.
	ctx, cancel := context.WithTimeout(ctx, forgetWithin)
	defer cancel()
	for {
		err := s.forget(ctx, name)
		if err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(forgetAgain):
		}
	}
}

// errIsServer is wrapped when a node is to be removed that is a server's.
var errIsServer = errors.New("that node is a server's")

// RemoveNode takes an agent out of the cluster: its key, so that its tunnels end and its
// certificates count no more, and then its node. It is idempotent.
func (s *Servers) RemoveNode(ctx context.Context, name string) error {
	all, _ := s.list.Servers()
	if _, server := all[name]; server {
		return fmt.Errorf("%w; remove it with \"kedge server remove %s\"", errIsServer, name)
	}
	known, err := s.nodes.Known(ctx, name)
	if err != nil {
		return err
	}
	if err := s.nodes.Forget(ctx, name); err != nil {
		return err
	}
	err = s.api.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{})
	switch {
	case apierrors.IsNotFound(err) && !known:
		return fmt.Errorf("%w: %q; \"kedge kubectl get nodes\" shows them", join.ErrUnknownNode, name)
	case err != nil && !apierrors.IsNotFound(err):
		return fmt.Errorf("delete the node %s: %w", name, err)
	}
	return nil
}

const (
	forgetWithin = 10 * time.Second
	forgetAgain  = 200 * time.Millisecond
)

// forget removes what the API knows of a server.
func (s *Servers) forget(ctx context.Context, name string) error {
	if err := s.api.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete the node of server %s: %w", name, err)
	}
	if err := s.nodes.Forget(ctx, name); err != nil {
		return err
	}
	return s.list.Forget(ctx, name)
}
