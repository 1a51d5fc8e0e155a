package membership

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
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
	"kedge/server/loopback"
)

// Store is the datastore of the servers.
type Store interface {
	// Leadership returns the leader, and a channel that is closed when it has changed.
	Leadership() (datastore.Leadership, <-chan struct{})
	Members(ctx context.Context) ([]datastore.Member, error)
	Admit(ctx context.Context, name string, peers []netip.AddrPort) (datastore.Admission, error)
	AdmitWitness(ctx context.Context, name string, peers []netip.AddrPort) (datastore.Admission, error)
	// Remove returns an error that is datastore.ErrNoMember for a server that is not a member.
	Remove(ctx context.Context, name string) error
}

// Leading is the condition under which this server runs what must run once in a
// cluster: its member leads the store, so nobody has to elect anybody else.
type Leading struct{ Store Store }

// Holds implements lifecycle.Condition.
func (l Leading) Holds() (bool, <-chan struct{}) {
	now, changed := l.Store.Leadership()
	return now.Leading, changed
}

// Servers is what the servers of a cluster have in common: the list of them, the
// members of the store, and the credentials that a new one gets.
type Servers struct {
	name  string // of this server
	dir   string // of this server
	store Store
	list  *directory.Directory
	nodes *join.Nodes // set by SetNodes before anything runs
	api   kubernetes.Interface
}

var (
	_ join.Servers      = (*Servers)(nil)
	_ directory.Members = (*Servers)(nil)
)

// New makes what the server called name knows of the others. dir is its directory, and api is where others reach it.
func New(name, dir string, api netip.AddrPort, lb *loopback.Loopback, store Store, log *slog.Logger) (*Servers, error) {
	c, err := kubernetes.NewForConfig(lb.Admin())
	if err != nil {
		return nil, fmt.Errorf("make the client of the servers' list: %w", err)
	}
	return &Servers{name: name, dir: dir, store: store, api: c, list: directory.New(name, api, c, log)}, nil
}

// API is the client with which the servers are looked after.
func (s *Servers) API() kubernetes.Interface { return s.api }

// SetNodes sets the nodes' keys. They belong to the service that admits machines, which itself needs the servers.
func (s *Servers) SetNodes(nodes *join.Nodes) { s.nodes = nodes }

// Directory is the component that keeps the list of servers.
func (s *Servers) Directory() *directory.Directory { return s.list }

// NewEndpoints makes the component that publishes the servers, for the one that leads.
func (s *Servers) NewEndpoints(lb *loopback.Loopback, id *identity.Identity, log *slog.Logger) (*directory.Endpoints, error) {
	c, err := kubernetes.NewForConfig(lb.Admin())
	if err != nil {
		return nil, fmt.Errorf("make the client of the endpoints: %w", err)
	}
	return directory.NewEndpoints(s.list, s, id.ServerCA.Cert, c, log), nil
}

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

// AdmitWitness implements join.Servers.
func (s *Servers) AdmitWitness(ctx context.Context, name string, peers []netip.AddrPort) (json.RawMessage, error) {
	a, err := s.store.AdmitWitness(ctx, name, peers)
	if err != nil {
		return nil, err
	}
	return json.Marshal(a)
}

// Members returns the members of the store.
func (s *Servers) Members(ctx context.Context) ([]datastore.Member, error) {
	return s.store.Members(ctx)
}

// Names implements directory.Members.
func (s *Servers) Names(ctx context.Context) ([]string, error) {
	members, err := s.store.Members(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range members {
		if m.Witness { // is no server
			continue
		}
		if m.Name == m.ID {
			return nil, fmt.Errorf("the member %s has not started, and its name is not known", m.ID)
		}
		names = append(names, m.Name)
	}
	return names, nil
}

// Remove takes a server out of the cluster: out of the store, which refuses when those
// that remain could not decide anything any more. What else was its, the server that
// leads forgets when it sees that (see directory.Endpoints), and Remove waits for it, but
// not for this server's own, whose process ends. It is idempotent.
func (s *Servers) Remove(ctx context.Context, name string) error {
	all, _ := s.list.Servers()
	_, listed := all[name]
	if err := s.store.Remove(ctx, name); err != nil && !(listed && errors.Is(err, datastore.ErrNoMember)) {
		return err
	}
	switch {
	case name == s.name:
		return nil
	case !listed: // it was admitted and never came; nobody else knows of it
		return s.Forget(ctx, name)
	}
	ctx, cancel := context.WithTimeout(ctx, forgetWithin)
	defer cancel()
	if err := s.list.Gone(ctx, name); err != nil {
		return fmt.Errorf("server %s is removed, and its node, its key and its entry in the list are not yet; that is done as soon as a server leads: %w", name, err)
	}
	return nil
}

// forgetWithin is how long a server that was removed may stay in the list: when the one
// that led was removed, there must be another first.
const forgetWithin = 20 * time.Second

// Expel implements directory.Members.
func (s *Servers) Expel(ctx context.Context, name string) error {
	if err := s.store.Remove(ctx, name); err != nil && !errors.Is(err, datastore.ErrNoMember) {
		return err
	}
	return nil
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
	members, err := s.store.Members(ctx)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(members, func(m datastore.Member) bool { return m.Witness && m.Name == name }) {
		return fmt.Errorf("%q is a witness and has no node; remove it with \"kedge server remove %s\"", name, name)
	}
	joined, err := s.nodes.Joined(ctx, name)
	if err != nil {
		return err
	}
	if err := s.nodes.Forget(ctx, name); err != nil {
		return err
	}
	err = s.api.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{})
	switch {
	case apierrors.IsNotFound(err) && !joined:
		return fmt.Errorf("%w: %q; \"kedge kubectl get nodes\" shows them", join.ErrUnknownNode, name)
	case err != nil && !apierrors.IsNotFound(err):
		return fmt.Errorf("delete the node %s: %w", name, err)
	}
	return nil
}

// Forget implements directory.Members.
func (s *Servers) Forget(ctx context.Context, name string) error {
	if err := s.api.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete the node of server %s: %w", name, err)
	}
	if err := s.nodes.Forget(ctx, name); err != nil {
		return err
	}
	return s.list.Forget(ctx, name)
}
