package directory

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"kedge/internal/servers"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// interval is the interval between checks of the other servers, and answerWithin the timeout of a check.
	interval     = time.Second
	answerWithin = time.Second
	// patience is the number of consecutive failed checks after which a server's endpoint is removed: one
	// failure may be a lost packet.
	patience = 2
)

// Members has the members of the datastore, and removes what belongs to a server.
type Members interface {
	// Names returns the names of the datastore's members, as agreed by a majority. It fails if the name of a
	// member is unknown.
	Names(ctx context.Context) ([]string, error)
	// Expel removes a server from the datastore. It returns an error if the remaining members would have no
	// majority, and does nothing for a server that is not a member.
	Expel(ctx context.Context, name string) error
	// Forget removes the objects of a server that is not a member: its node, its key, so that another machine
	// can use the name, and finally its entry in the list.
	Forget(ctx context.Context, name string) error
}

// Endpoints is the component that runs on one server at a time. It publishes the servers that answer as the
// endpoints of the service "kubernetes", expels servers from the datastore whose nodes were deleted, and cleans
// up after servers that are not members any more, whatever removed them.
type Endpoints struct {
	dir     *Directory
	members Members
	client  kubernetes.Interface
	log     *slog.Logger
	check   func(ctx context.Context, api netip.AddrPort) error // returns nil if the API is ready

	failures map[string]int  // consecutive failed checks of a server; a server without an entry was not checked yet
	refused  map[string]bool // servers whose removal was refused and logged
}

// NewEndpoints returns the component. authority has signed the certificates of the servers' APIs.
func NewEndpoints(dir *Directory, members Members, authority *x509.Certificate, client kubernetes.Interface, log *slog.Logger) *Endpoints {
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	checker := &http.Client{Timeout: answerWithin, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: servers.Host, MinVersion: tls.VersionTLS12},
		// A kept connection would not show whether new connections work.
		DisableKeepAlives: true,
	}}
	return &Endpoints{
		dir: dir, members: members, client: client, log: log,
		check: func(ctx context.Context, api netip.AddrPort) error {
			return servers.ProbeReady(ctx, checker, api.String())
		},
		failures: map[string]int{}, refused: map[string]bool{},
	}
}

// Name implements lifecycle.Component.
func (e *Endpoints) Name() string { return "endpoints" }

// Run implements lifecycle.Component. It calls ready when the endpoints were published.
func (e *Endpoints) Run(ctx context.Context, ready func()) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	// A term may begin, and end, before anything can be read.
	for {
		err := e.trustPublished(ctx)
		if err == nil {
			break
		}
		if ctx.Err() == nil {
			e.log.Warn("the other servers cannot be checked yet; trying again", "err", err, "again", interval)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
	var published []netip.AddrPort
	for {
		servers, changed := e.dir.Servers()
		e.checkAll(ctx, servers)
		if healthy := e.healthy(servers); !slices.Equal(healthy, published) {
			switch err := publish(ctx, e.client, healthy); {
			case err == nil:
				published = healthy
			case ctx.Err() == nil:
				e.log.Warn("the endpoints of the service \"kubernetes\" could not be written; trying again", "err", err, "again", interval)
			}
		}
		if published != nil {
			ready()
		}
		others := tick.C
		if len(servers) == 1 {
			others = nil // there are no other servers
			if published == nil {
				others = tick.C
			}
		} else {
			e.followMembers(ctx, servers)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-others:
		}
	}
}

// trustPublished treats the published servers as healthy until a check fails: the previous leader has checked
// them.
func (e *Endpoints) trustPublished(ctx context.Context) error {
	slice, err := e.client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Get(ctx, serviceName, metav1.GetOptions{})
	if err != nil {
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("read the endpoints of the service \"kubernetes\": %w", err)
	}
	servers, _ := e.dir.Servers()
	for name, s := range servers {
		for _, p := range slice.Endpoints {
			if slices.Contains(p.Addresses, s.API.Addr().String()) {
				e.failures[name] = 0
			}
		}
	}
	return nil
}

// checkAll checks every other server once, and counts failures.
func (e *Endpoints) checkAll(ctx context.Context, servers map[string]Entry) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	for name, s := range servers {
		if name == e.dir.name {
			continue
		}
		wg.Go(func() {
			err := e.check(ctx, s.API)
			mu.Lock()
			defer mu.Unlock()
			failed, known := e.failures[name]
			switch {
			case err == nil:
				if failed >= patience {
					e.log.Info("a server answers again", "server", name)
				}
				e.failures[name] = 0
			case !known:
				e.failures[name] = patience
			default:
				if failed++; failed == patience && ctx.Err() == nil {
					e.log.Warn("a server does not answer", "server", name, "api", s.API, "err", err)
				}
				e.failures[name] = failed
			}
		})
	}
	wg.Wait()
	maps.DeleteFunc(e.failures, func(name string, _ int) bool { _, there := servers[name]; return !there })
}

// healthy returns the sorted API addresses of this server and of those that answer.
func (e *Endpoints) healthy(servers map[string]Entry) []netip.AddrPort {
	var out []netip.AddrPort
	for name, s := range servers {
		if failed, known := e.failures[name]; name == e.dir.name || known && failed < patience {
			out = append(out, s.API)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// followMembers expels the servers whose nodes were deleted, and cleans up after servers that are not members
// of the datastore. A server is listed only after it became a member.
func (e *Endpoints) followMembers(ctx context.Context, servers map[string]Entry) {
	// The members are read after the list, so that a server that has joined in between is among them.
	members, err := e.members.Names(ctx)
	if err != nil {
		e.log.Debug("the members of the datastore are unknown; trying again", "err", err, "again", interval)
		return
	}
	for name, s := range servers {
		member := slices.Contains(members, name)
		if member && s.Node != "" && e.nodeDeleted(ctx, name) {
			member = !e.expel(ctx, name)
		}
		if member || name == e.dir.name { // this server stops instead
			continue
		}
		switch err := e.members.Forget(ctx, name); {
		case err == nil:
			e.log.Info("a server was removed", "server", name)
		case ctx.Err() == nil:
			e.log.Warn("a server was removed, but not all of its objects; trying again", "server", name, "err", err, "again", interval)
		}
	}
}

// nodeDeleted reports whether a server's node was deleted.
func (e *Endpoints) nodeDeleted(ctx context.Context, name string) bool {
	// A cache could be older than the list's entry, which was written after the node was created.
	_, err := e.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		delete(e.refused, name)
		return false
	}
	return true
}

// expel removes a server whose node was deleted from the datastore, and reports whether it succeeded.
func (e *Endpoints) expel(ctx context.Context, name string) bool {
	err := e.members.Expel(ctx, name)
	switch {
	case err == nil:
		delete(e.refused, name)
	case ctx.Err() == nil && !e.refused[name]:
		e.refused[name] = true
		e.log.Error("the node of a server was deleted, but the server cannot be removed", "server", name, "err", err)
	}
	return err == nil
}

// serviceName is the name of the service, in the namespace default.
const serviceName = "kubernetes"

// publish writes the endpoints of the service "kubernetes". Upstream maintains a lease for each server, renewed
// every ten seconds; here a write after a change is sufficient, because one server checks the others.
func publish(ctx context.Context, c kubernetes.Interface, servers []netip.AddrPort) error {
	if len(servers) == 0 {
		return errors.New("no server")
	}
	// A slice has one family and one set of ports: those of the first server, because all servers of a cluster
	// have the same.
	family, port := servers[0].Addr().Is6(), int32(servers[0].Port())
	name, protocol, ready := "https", corev1.ProtocolTCP, true
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: serviceName, Namespace: metav1.NamespaceDefault,
			Labels: map[string]string{discoveryv1.LabelServiceName: serviceName},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &protocol}},
	}
	if family {
		slice.AddressType = discoveryv1.AddressTypeIPv6
	}
	//nolint:staticcheck // Endpoints is deprecated, but old clients read it for this one service.
	legacy := &corev1.Endpoints{
		ObjectMeta: metav1.ObjectMeta{
			Name: serviceName, Namespace: metav1.NamespaceDefault,
			Labels: map[string]string{discoveryv1.LabelSkipMirror: "true"},
		},
		Subsets: []corev1.EndpointSubset{{Ports: []corev1.EndpointPort{{Name: name, Port: port, Protocol: protocol}}}},
	}
	for _, s := range servers {
		if s.Addr().Is6() != family || int32(s.Port()) != port {
			continue
		}
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{s.Addr().String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
		legacy.Subsets[0].Addresses = append(legacy.Subsets[0].Addresses, corev1.EndpointAddress{IP: s.Addr().String()})
	}
	if err := ensureSlice(ctx, c, slice); err != nil {
		return err
	}
	endpoints := c.CoreV1().Endpoints(metav1.NamespaceDefault)
	old, err := endpoints.Get(ctx, legacy.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		_, err = endpoints.Create(ctx, legacy, metav1.CreateOptions{})
	case err == nil && !equality.Semantic.DeepEqual(old.Subsets, legacy.Subsets):
		legacy.ResourceVersion = old.ResourceVersion
		_, err = endpoints.Update(ctx, legacy, metav1.UpdateOptions{})
	}
	return err
}

func ensureSlice(ctx context.Context, c kubernetes.Interface, want *discoveryv1.EndpointSlice) error {
	slices := c.DiscoveryV1().EndpointSlices(want.Namespace)
	old, err := slices.Get(ctx, want.Name, metav1.GetOptions{})
	if err == nil && old.AddressType != want.AddressType { // the type is immutable, and the cluster has changed its family
		if err := slices.Delete(ctx, want.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return err
		}
		_, err = slices.Create(ctx, want, metav1.CreateOptions{})
		return err
	}
	switch {
	case apierrors.IsNotFound(err):
		_, err = slices.Create(ctx, want, metav1.CreateOptions{})
	case err == nil && !(equality.Semantic.DeepEqual(old.Endpoints, want.Endpoints) && equality.Semantic.DeepEqual(old.Ports, want.Ports)):
		want.ResourceVersion = old.ResourceVersion
		_, err = slices.Update(ctx, want, metav1.UpdateOptions{})
	}
	return err
}
