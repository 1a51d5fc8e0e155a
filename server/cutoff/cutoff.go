// Package cutoff keeps clients from waiting at an API server that is cut off from the other servers: it ends
// their watches, which would deliver no events for half a minute, and makes them connect to another server.
//
// It does not apply to the components of this process, which use this server only and whose watches continue
// when the servers have a leader again. Only package server may import it.
package cutoff

import (
	"context"
	"net/http"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// Patience is how long this server must know no leader before it counts as cut off. An election is faster. The
// datastore detects the loss of its leader within two seconds, so a server counts as cut off after less than
// five.
const Patience = 2 * time.Second

// CutOff tracks whether this server is cut off. Use [New].
type CutOff struct {
	leader func() (known bool, changed <-chan struct{})

	mu  sync.Mutex         // guards the fields below
	era context.Context    // cancelled when this server is cut off, and then replaced
	end context.CancelFunc // cancels era
}

// New returns a CutOff. leader reports whether this server knows a leader, and returns a channel that is closed
// when that may have changed.
func New(leader func() (known bool, changed <-chan struct{})) *CutOff {
	c := &CutOff{leader: leader}
	c.era, c.end = context.WithCancel(context.Background())
	return c
}

// Follow tracks the leader until ctx ends.
func (c *CutOff) Follow(ctx context.Context) {
	for ctx.Err() == nil {
		known, changed := c.leader()
		var over <-chan time.Time
		if known {
			c.rejoined()
		} else {
			over = time.After(Patience)
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-over:
			c.end()
			select {
			case <-ctx.Done():
			case <-changed:
			}
		}
	}
}

// rejoined starts a new era if the last one has ended.
func (c *CutOff) rejoined() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.era.Err() != nil {
		c.era, c.end = context.WithCancel(context.Background())
	}
}

func (c *CutOff) now() context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.era
}

// Handler wraps next, for requests with request info in their context. own reports whether a request comes from
// this process.
func (c *CutOff) Handler(next http.Handler, codecs runtime.NegotiatedSerializer, own func(*http.Request) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if own(r) {
			next.ServeHTTP(w, r)
			return
		}
		era := c.now()
		if era.Err() != nil {
			// For HTTP/2 this header is a GOAWAY: the client sends its next request over a new connection,
			// which leads to another server if there is one.
			w.Header().Set("Connection", "close")
		}
		info, ok := request.RequestInfoFrom(r.Context())
		switch {
		case !ok || info.Verb != "watch":
			next.ServeHTTP(w, r)
		case era.Err() != nil:
			err := apierrors.NewServiceUnavailable("this server is cut off from the other servers and receives no changes")
			responsewriters.ErrorNegotiated(err, codecs, schema.GroupVersion{Group: info.APIGroup, Version: info.APIVersion}, w, r)
		default:
			ctx, cancel := context.WithCancel(r.Context())
			defer cancel()
			defer context.AfterFunc(era, cancel)()
			next.ServeHTTP(w, r.WithContext(ctx))
		}
	})
}
