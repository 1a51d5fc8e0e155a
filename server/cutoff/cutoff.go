// Package cutoff keeps clients from waiting at an API server that is cut off from the
// others: it ends their watches, which would go on for half a minute and tell nothing,
// and asks them to connect elsewhere.
//
// It is not for the parts of this process, which have nowhere else to go and whose watches
// go on by themselves when the servers agree again. It may be imported by server only.
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

// Patience is for how long there must be no leader before this server counts as cut off.
// An election takes less; with the time in which the store notices, which is up to two
// seconds, it makes less than five.
const Patience = 2 * time.Second

// CutOff knows whether this server is cut off. Make one with [New].
type CutOff struct {
	leader func() (known bool, changed <-chan struct{})

	mu  sync.Mutex // guards what follows
	era context.Context
	end context.CancelFunc // of the era: this server is cut off
}

// New makes one that is told by leader whether this server knows of one, and when that
// may have changed.
func New(leader func() (known bool, changed <-chan struct{})) *CutOff {
	c := &CutOff{leader: leader}
	c.era, c.end = context.WithCancel(context.Background())
	return c
}

// Follow returns when ctx ends.
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

// rejoined begins another era if the last one is over.
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

// Handler stands before next for requests whose info is in their context. own reports
// which of them come from this process.
func (c *CutOff) Handler(next http.Handler, codecs runtime.NegotiatedSerializer, own func(*http.Request) bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if own(r) {
			next.ServeHTTP(w, r)
			return
		}
		era := c.now()
		if era.Err() != nil {
			// To HTTP/2 this is a GOAWAY: what is asked next is asked over another
			// connection, which leads to another server if there is one.
			w.Header().Set("Connection", "close")
		}
		info, ok := request.RequestInfoFrom(r.Context())
		switch {
		case !ok || info.Verb != "watch":
			next.ServeHTTP(w, r)
		case era.Err() != nil:
			err := apierrors.NewServiceUnavailable("this server is cut off from the others and hears of no changes")
			responsewriters.ErrorNegotiated(err, codecs, schema.GroupVersion{Group: info.APIGroup, Version: info.APIVersion}, w, r)
		default:
			ctx, cancel := context.WithCancel(r.Context())
			defer cancel()
			defer context.AfterFunc(era, cancel)()
			next.ServeHTTP(w, r.WithContext(ctx))
		}
	})
}
