package directory

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

const (
	// interval is how often the other servers are asked whether they answer, and
	// answerWithin how long one may take.
	interval     = time.Second
	answerWithin = time.Second
	// patience is how many answers in a row a server may owe before it is taken out:
	// one can be lost with a packet.
	patience = 2
	// apiName is in the certificate of every server's API.
	apiName = "kubernetes"
)

// Members is who the store's members are, and what else is a server's, as far as it is
// needed here.
type Members interface {
	// Names are the names of the store's members, as a majority has agreed on them. It
	// fails while one is among them whose name nobody knows.
	Names(ctx context.Context) ([]string, error)
	// Expel takes a server out of the store. It refuses when those that remain could
	// not decide anything any more, and does nothing for one that is no member.
	Expel(ctx context.Context, name string) error
	// Forget removes what the API knows of a server that is no member: its node, its
	// key, so that another machine can have the name, and at last its entry in the list.
	Forget(ctx context.Context, name string) error
}

// Endpoints is the component that runs on one server at a time: it publishes the
// servers that answer as the endpoints of the service "kubernetes", takes those out of
// the store whose nodes were deleted, and forgets those that are not in the store, by
// whomever and however far they were removed.
type Endpoints struct {
	dir     *Directory
	members Members
	client  kubernetes.Interface
	log     *slog.Logger
	ask     func(ctx context.Context, api netip.AddrPort) error // nil: it serves

	failures map[string]int  // answers in a row that a server owes; an unknown one owes all
	refused  map[string]bool // servers whose removal was refused, which was said
}

// NewEndpoints makes the component. authority has signed the certificates of the
// servers' APIs.
func NewEndpoints(dir *Directory, members Members, authority *x509.Certificate, client kubernetes.Interface, log *slog.Logger) *Endpoints {
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	asking := &http.Client{Timeout: answerWithin, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: apiName, MinVersion: tls.VersionTLS12},
		// A connection that is kept would say nothing about a new one.
		DisableKeepAlives: true,
	}}
	return &Endpoints{
		dir: dir, members: members, client: client, log: log,
		ask:      func(ctx context.Context, api netip.AddrPort) error { return askReady(ctx, asking, api) },
		failures: map[string]int{}, refused: map[string]bool{},
	}
}

func askReady(ctx context.Context, c *http.Client, api netip.AddrPort) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+api.String()+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 1<<20)); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz answers %s", resp.Status)
	}
	return nil
}

// Name implements lifecycle.Component.
func (e *Endpoints) Name() string { return "endpoints" }

// Run implements lifecycle.Component. It is ready when the endpoints were published.
func (e *Endpoints) Run(ctx context.Context, ready func()) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	// A term may begin when nothing can be read yet, and end so.
	for {
		err := e.trustPublished(ctx)
		if err == nil {
			break
		}
		if ctx.Err() == nil {
			e.log.Warn("the other servers are not looked after yet", "err", err, "again", interval)
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
		e.askAll(ctx, servers)
		if healthy := e.healthy(servers); !slices.Equal(healthy, published) {
			switch err := publish(ctx, e.client, healthy); {
			case err == nil:
				published = healthy
			case ctx.Err() == nil:
				e.log.Warn("the endpoints of the service \"kubernetes\" were not written", "err", err, "again", interval)
			}
		}
		if published != nil {
			ready()
		}
		others := tick.C
		if len(servers) == 1 {
			others = nil // nobody to ask about
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

// trustPublished takes the servers that are published for healthy until they owe an
// answer: the server that published them knew.
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

// askAll asks every other server once, and counts what they owe.
func (e *Endpoints) askAll(ctx context.Context, servers map[string]Entry) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	for name, s := range servers {
		if name == e.dir.name {
			continue
		}
		wg.Go(func() {
			err := e.ask(ctx, s.API)
			mu.Lock()
			defer mu.Unlock()
			owed, known := e.failures[name]
			switch {
			case err == nil:
				if owed >= patience {
					e.log.Info("a server answers again", "server", name)
				}
				e.failures[name] = 0
			case !known:
				e.failures[name] = patience
			default:
				if owed++; owed == patience && ctx.Err() == nil {
					e.log.Warn("a server does not answer", "server", name, "api", s.API, "err", err)
				}
				e.failures[name] = owed
			}
		})
	}
	wg.Wait()
	maps.DeleteFunc(e.failures, func(name string, _ int) bool { _, there := servers[name]; return !there })
}

// healthy returns the addresses of this server and of those that answer, sorted.
func (e *Endpoints) healthy(servers map[string]Entry) []netip.AddrPort {
	var out []netip.AddrPort
	for name, s := range servers {
		if owed, known := e.failures[name]; name == e.dir.name || known && owed < patience {
			out = append(out, s.API)
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}

// followMembers expels the servers whose nodes were deleted, and forgets those that are
// no members of the store. A server is listed only after it became one.
func (e *Endpoints) followMembers(ctx context.Context, servers map[string]Entry) {
	// The members as of after the list: one that has joined since is among them.
	members, err := e.members.Names(ctx)
	if err != nil {
		e.log.Debug("the members of the store are not known", "err", err, "again", interval)
		return
	}
	for name, s := range servers {
		member := slices.Contains(members, name)
		if member && s.Node != "" && e.nodeDeleted(ctx, name) {
			member = !e.expel(ctx, name)
		}
		if member || name == e.dir.name { // this one would not forget itself: it stops
			continue
		}
		switch err := e.members.Forget(ctx, name); {
		case err == nil:
			e.log.Info("a server was removed", "server", name)
		case ctx.Err() == nil:
			e.log.Warn("a server was removed, and not all that it left", "server", name, "err", err, "again", interval)
		}
	}
}

// nodeDeleted reports whether a server's node is not there any more.
func (e *Endpoints) nodeDeleted(ctx context.Context, name string) bool {
	// Not from a cache: it could be older than the entry, which was written when the
	// node was there.
	_, err := e.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		delete(e.refused, name)
		return false
	}
	return true
}

// expel takes a server out of the store whose node was deleted, and reports whether it
// is.
func (e *Endpoints) expel(ctx context.Context, name string) bool {
	err := e.members.Expel(ctx, name)
	switch {
	case err == nil:
		delete(e.refused, name)
	case ctx.Err() == nil && !e.refused[name]:
		e.refused[name] = true
		e.log.Error("the node of a server was deleted, and the server stays", "server", name, "err", err)
	}
	return err == nil
}

// serviceName is the service, in the namespace default.
const serviceName = "kubernetes"

// publish makes the service "kubernetes" lead to the servers. Upstream does this with
// a lease for each server, renewed every ten seconds; a write when something changes is
// enough, since one server knows.
func publish(ctx context.Context, c kubernetes.Interface, servers []netip.AddrPort) error {
	if len(servers) == 0 {
		return errors.New("no server")
	}
	// One slice has one family and one set of ports. The first server's decide; there
	// is no cluster whose servers differ in them.
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
	if err == nil && old.AddressType != want.AddressType { // immutable: the cluster changed its family
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
