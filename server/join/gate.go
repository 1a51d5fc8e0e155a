package join

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/joining"
	"kedge/internal/pki"
)

// Why requests are refused.
var (
	errRevoked     = errors.New("this key is not the node's any more: the node was removed, or its name was given to another machine")
	errUserRevoked = errors.New("this kubeconfig was revoked, or the cluster has no record of it; \"kedge kubeconfig create\" on a server makes another")
)

// Users are the kubeconfigs of users, whose certificates can be revoked.
type Users interface {
	// Holder returns the fingerprint of the key in the certificate of a kubeconfig, and false for other certificates.
	Holder(c *x509.Certificate) (fingerprint string, ok bool)
	// Follow calls tell with the fingerprints of valid kubeconfigs, by themselves, whenever they change, until ctx ends
	// or it fails.
	Follow(ctx context.Context, tell func(map[string]string)) error
}

// Gate is the component that refuses requests to the API with certificates of nodes whose
// keys do not have the name any more, and of kubeconfigs that were revoked, long before they
// expire, and ends those that are under way. It judges nothing else: who a request is from
// decides the API server after it. It is the one that watches the keys, also for others.
type Gate struct {
	nodes   *roll
	users   *roll
	holder  func(*x509.Certificate) (string, bool) // of Users
	network string                                 // of the user names of nodes' data paths
	log     *slog.Logger
}

// passing is a request that was let through.
type passing struct {
	name, key string
	end       context.CancelCauseFunc
}

// Gate makes the component of a service's nodes and of users. It is asked by the handler that
// [Gate.Handler] returns.
func (s *Service) Gate(users Users, log *slog.Logger) *Gate {
	return &Gate{
		nodes: newRoll("nodes", s.nodes.Follow, errRevoked), users: newRoll("users", users.Follow, errUserRevoked),
		holder: users.Holder, network: s.cfg.NetworkGroup + ":", log: log,
	}
}

// Name implements lifecycle.Component.
func (g *Gate) Name() string { return "gate" }

// Run implements lifecycle.Component. It is ready at once. The users' keys are followed from the
// first request of a kubeconfig on: most clusters have none.
func (g *Gate) Run(ctx context.Context, ready func()) error {
	ready()
	var users sync.WaitGroup
	defer users.Wait()
	users.Go(func() {
		select {
		case <-ctx.Done():
		case <-g.users.wanted:
			g.users.run(ctx, g.log)
		}
	})
	g.nodes.run(ctx, g.log)
	return nil
}

// Keys returns the fingerprints of all nodes' keys as this server knows them, by name,
// which are not to be changed, and nil before they are known; and a channel that is
// closed when they are others.
func (g *Gate) Keys() (map[string]string, <-chan struct{}) { return g.nodes.now() }

// Handler passes requests on to next, but for those of keys that have lost their name.
func (g *Gate) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, name, key := g.claims(r)
		if who == nil {
			next.ServeHTTP(w, r)
			return
		}
		ctx := r.Context()
		if who == g.nodes {
			ctx = WithSource(ctx, sourceOf(r))
		}
		ctx, end := context.WithCancelCause(ctx)
		defer end(nil)
		p := &passing{name, key, end}
		if err := who.enter(ctx, p); err != nil {
			refuse(w, err)
			return
		}
		defer who.leave(p)
		next.ServeHTTP(endsWith(ctx, who.revoked, w, r), r.WithContext(ctx))
	})
}

// sourceKey is where the context of a request has the address that it comes from.
type sourceKey struct{}

// WithSource notes from where a node's request comes.
func WithSource(ctx context.Context, source netip.Addr) context.Context {
	return context.WithValue(ctx, sourceKey{}, source)
}

// Source returns the address from which a request comes that a node has made over the
// network, and false for all others.
func Source(ctx context.Context) (source netip.Addr, ok bool) {
	source, ok = ctx.Value(sourceKey{}).(netip.Addr)
	return source, ok
}

// claims returns the roll that the certificate of the connection belongs to, nil for none, the
// name there, and the fingerprint of its key. Whether the cluster has signed it is not looked at:
// nobody gets in because of what is said here.
func (g *Gate) claims(r *http.Request) (who *roll, name, key string) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil, "", ""
	}
	c := r.TLS.PeerCertificates[0]
	if key, ok := g.holder(c); ok {
		return g.users, key, key
	}
	node, ours := strings.CutPrefix(c.Subject.CommonName, joining.NodeUser(""))
	if !ours {
		node, ours = strings.CutPrefix(c.Subject.CommonName, g.network)
	}
	if !ours {
		return nil, "", ""
	}
	key, err := pki.FingerprintOf(c)
	if err != nil {
		key = "" // no node has a key of another kind
	}
	return g.nodes, node, key
}

// refuse answers as the API server does.
func refuse(w http.ResponseWriter, err error) {
	s := metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: http.StatusUnauthorized, Reason: metav1.StatusReasonUnauthorized, Message: err.Error(),
	}
	if errors.Is(err, errNoKeys) {
		s.Code, s.Reason = http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable
		w.Header().Set("Retry-After", "1")
	}
	reply(w, int(s.Code), s)
}
