package join

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// followAgain is how long keys that cannot be followed are left alone. Meanwhile the
	// last that were known count.
	followAgain = time.Second
	// firstKeys is how long the first request of a node or a user waits for the keys.
	firstKeys = 5 * time.Second
)

// errNoKeys is what clients are told before the keys are known.
var errNoKeys = errors.New("this server does not know the keys of nodes and users yet; try again")

// roll is which keys are let in under which names, and the requests that were let in.
type roll struct {
	of      string // for the log
	follow  func(ctx context.Context, tell func(map[string]string)) error
	revoked error         // why keys are refused
	known   chan struct{} // closed when keys are known

	want   sync.Once     // closes wanted
	wanted chan struct{} // closed when the first request comes

	mu      sync.Mutex        // guards what follows
	keys    map[string]string // fingerprints by name: replaced, never changed
	changed chan struct{}     // closed when keys is another
	running map[*passing]struct{}
}

func newRoll(of string, follow func(context.Context, func(map[string]string)) error, revoked error) *roll {
	return &roll{
		of: of, follow: follow, revoked: revoked, known: make(chan struct{}), wanted: make(chan struct{}),
		changed: make(chan struct{}), running: map[*passing]struct{}{},
	}
}

// run follows the keys until ctx ends.
func (l *roll) run(ctx context.Context, log *slog.Logger) {
	for ctx.Err() == nil {
		if err := l.follow(ctx, l.keep); err != nil && ctx.Err() == nil {
			log.Debug("watch of keys ended", "of", l.of, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(followAgain):
		}
	}
}

// keep takes over the keys, and ends requests of others.
func (l *roll) keep(keys map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.keys == nil {
		close(l.known)
	}
	l.keys = keys
	close(l.changed)
	l.changed = make(chan struct{})
	for p := range l.running {
		if keys[p.name] != p.key {
			p.end(l.revoked)
		}
	}
}

// now returns the keys, nil before they are known, and a channel that is closed when they are others.
func (l *roll) now() (map[string]string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.keys, l.changed
}

// enter lets a request through and notes it, or returns why it is refused.
func (l *roll) enter(ctx context.Context, p *passing) error {
	l.want.Do(func() { close(l.wanted) })
	wait := time.NewTimer(firstKeys)
	defer wait.Stop()
	select {
	case <-l.known:
	case <-wait.C:
		return errNoKeys
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.key == "" || l.keys[p.name] != p.key {
		return l.revoked
	}
	l.running[p] = struct{}{}
	return nil
}

func (l *roll) leave(p *passing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.running, p)
}

// endsWith returns a response like w whose connection is closed when ctx ends with the cause, also if it was hijacked:
// a shell in a container does not look at the context of its request.
func endsWith(ctx context.Context, cause error, w http.ResponseWriter, r *http.Request) http.ResponseWriter {
	h, ok := w.(http.Hijacker)
	f, flushes := w.(http.Flusher)
	if !ok || !flushes || r.Header.Get("Upgrade") == "" {
		return w
	}
	return &ending{w, f, h, func(conn net.Conn) {
		context.AfterFunc(ctx, func() {
			if errors.Is(context.Cause(ctx), cause) { // and not because the handler has returned, which closes it in order
				conn.Close()
			}
		})
	}}
}

// ending has the methods that handlers of upgrade requests need in a response of HTTP/1.1.
type ending struct {
	http.ResponseWriter
	http.Flusher
	hijacker http.Hijacker
	hijacked func(net.Conn)
}

// Hijack implements http.Hijacker.
func (e *ending) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := e.hijacker.Hijack()
	if err != nil {
		return nil, nil, err
	}
	e.hijacked(conn)
	return conn, buffered, nil
}

// CloseNotify implements http.CloseNotifier, which the API server's filters need.
//
//nolint:staticcheck // they accept nothing else
func (e *ending) CloseNotify() <-chan bool {
	if n, ok := e.ResponseWriter.(http.CloseNotifier); ok {
		return n.CloseNotify()
	}
	return make(chan bool)
}

// Unwrap is for http.ResponseController.
func (e *ending) Unwrap() http.ResponseWriter { return e.ResponseWriter }
