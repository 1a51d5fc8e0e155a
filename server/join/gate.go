package join

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/joining"
	"kedge/internal/pki"
)

// errRevoked is what a node is told whose name is not its key's any more.
var errRevoked = errors.New("this key is not the node's any more: the node was removed, or its name was given to another machine")

// Gate is the component that refuses requests to the API with certificates of nodes whose
// keys do not have the name any more, long before they expire, and ends those that are
// under way. It judges nothing else: who a request is from decides the API server after it.
// It is the one that watches the keys, also for others.
type Gate struct {
	nodes   *Nodes
	network string // of the user names of nodes' data paths
	log     *slog.Logger
	known   chan struct{} // closed when keys are known

	mu      sync.Mutex        // guards what follows
	keys    map[string]string // as [Gate.Keys] returns them: replaced, never changed
	changed chan struct{}     // closed when keys is another
	running map[*passing]struct{}
}

// passing is a request that was let through.
type passing struct {
	node, key string
	end       context.CancelCauseFunc
}

// Gate makes the component of a service's nodes. It is asked by the handler that
// [Gate.Handler] returns.
func (s *Service) Gate(log *slog.Logger) *Gate {
	return &Gate{nodes: s.nodes, network: s.cfg.NetworkGroup + ":", log: log, known: make(chan struct{}), changed: make(chan struct{}), running: map[*passing]struct{}{}}
}

// Name implements lifecycle.Component.
func (g *Gate) Name() string { return "gate" }

const (
	// followAgain is how long keys that cannot be followed are left alone. Meanwhile the
	// last that were known count.
	followAgain = time.Second
	// firstKeys is how long the first request of a node waits for the keys.
	firstKeys = 5 * time.Second
)

// Run implements lifecycle.Component. It is ready at once.
func (g *Gate) Run(ctx context.Context, ready func()) error {
	ready()
	for ctx.Err() == nil {
		if err := g.nodes.Follow(ctx, g.keep); err != nil && ctx.Err() == nil {
			g.log.Debug("watch of the nodes' keys ended", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(followAgain):
		}
	}
	return nil
}

// keep takes over the keys, and ends requests of others.
func (g *Gate) keep(keys map[string]string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.keys == nil {
		close(g.known)
	}
	g.keys = keys
	close(g.changed)
	g.changed = make(chan struct{})
	for p := range g.running {
		if keys[p.node] != p.key {
			p.end(errRevoked)
		}
	}
}

// Keys returns the fingerprints of all nodes' keys as this server knows them, by name,
// which are not to be changed, and nil before they are known; and a channel that is
// closed when they are others.
func (g *Gate) Keys() (map[string]string, <-chan struct{}) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.keys, g.changed
}

// Handler passes requests on to next, but for those of keys that have lost their name.
func (g *Gate) Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		node, key, ours := g.claims(r)
		if !ours {
			next.ServeHTTP(w, r)
			return
		}
		ctx, end := context.WithCancelCause(WithSource(r.Context(), sourceOf(r)))
		defer end(nil)
		p := &passing{node, key, end}
		if err := g.enter(ctx, p); err != nil {
			refuse(w, err)
			return
		}
		defer g.leave(p)
		next.ServeHTTP(w, r.WithContext(ctx))
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

// claims returns the node as which the connection's certificate calls, if any, and the
// fingerprint of its key. Whether the cluster has signed it is not looked at: nobody gets
// in because of what is said here.
func (g *Gate) claims(r *http.Request) (node, key string, ours bool) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return "", "", false
	}
	c := r.TLS.PeerCertificates[0]
	node, ours = strings.CutPrefix(c.Subject.CommonName, joining.NodeUser(""))
	if !ours {
		node, ours = strings.CutPrefix(c.Subject.CommonName, g.network)
	}
	if !ours {
		return "", "", false
	}
	public, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return node, "", true // no node has a key of another kind
	}
	key, err := pki.Fingerprint(public)
	if err != nil {
		key = ""
	}
	return node, key, true
}

// errNoKeys is what a node is told before the keys are known.
var errNoKeys = errors.New("this server does not know the nodes' keys yet; try again")

// enter lets a request through and notes it, or returns why it is refused.
func (g *Gate) enter(ctx context.Context, p *passing) error {
	wait := time.NewTimer(firstKeys)
	defer wait.Stop()
	select {
	case <-g.known:
	case <-wait.C:
		return errNoKeys
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.key == "" || g.keys[p.node] != p.key {
		return errRevoked
	}
	g.running[p] = struct{}{}
	return nil
}

func (g *Gate) leave(p *passing) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.running, p)
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
