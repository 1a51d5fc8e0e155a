// Package loopback is the API client for code in the API server's process: a client transport that calls the
// server's handler, without a socket or TLS.
//
// It is not for code in another process, and does not bypass authorization: every request acts as a named user.
// The packages server and assembly, which pass on client configurations, may import it.
package loopback

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/rest"
)

// ErrAPINotServing is the error of requests before the API server is assembled.
var ErrAPINotServing = errors.New("the API server is not serving yet")

// Loopback passes requests of this process to the API server's handler by a function call. They pass the same
// authorization, admission, and priority and fairness as any other request; only the socket, TLS and
// authentication are left out.
//
// The identity is in the request's context under a private key, which requests from the network cannot set.
type Loopback struct {
	handler *atomic.Pointer[http.Handler]
	may     Condition // requests may write only while it holds; nil: always
}

// New returns a loopback whose requests fail with [ErrAPINotServing] until the API component serves.
func New() *Loopback { return &Loopback{handler: new(atomic.Pointer[http.Handler])} }

// ErrNotLeading is the error of a write by a component that may not write any more.
var ErrNotLeading = errors.New("this server is not the leader any more")

// Condition is a state that may change, for example that this server leads. The channel is closed when it may
// have changed.
type Condition interface {
	Holds() (bool, <-chan struct{})
}

// While returns a loopback for components that may write only while the condition holds: other writes are
// refused, and writes in progress are cancelled. A component needs time to stop, while another server may have
// taken over its work. Reads continue to work.
func (l *Loopback) While(holds Condition) *Loopback { return &Loopback{handler: l.handler, may: holds} }

// fence cancels a write when the condition does not hold any more. It returns when the request has ended.
func fence(ctx context.Context, may Condition, changed <-chan struct{}, cut context.CancelFunc) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
		var holds bool
		if holds, changed = may.Holds(); !holds {
			cut()
			return
		}
	}
}

// writes reports whether a request may change something.
func writes(req *http.Request) bool {
	return req.Method != http.MethodGet && req.Method != http.MethodHead
}

// Serve sets the handler for all requests from now on.
func (l *Loopback) Serve(h http.Handler) { l.handler.Store(&h) }

// Config returns a client configuration that acts as the named user with groups (system:authenticated is
// added). Objects are encoded as protobuf if the type allows it. There is no client-side rate limit, because
// the API server's priority and fairness applies.
func (l *Loopback) Config(name string, groups ...string) *rest.Config {
	who := &user.DefaultInfo{Name: name, Groups: append([]string{user.AllAuthenticated}, groups...)}
	return &rest.Config{
		Host:      "http://kedge.internal",
		Transport: &memoryTransport{loopback: l, user: who},
		QPS:       -1,
		UserAgent: "kedge/" + name,
		ContentConfig: rest.ContentConfig{
			AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json",
			ContentType:        "application/vnd.kubernetes.protobuf",
		},
	}
}

// Admin returns the client configuration of kedge's own code on the server.
func (l *Loopback) Admin() *rest.Config { return l.Config("system:kedge", user.SystemPrivilegedGroup) }

type identityKey struct{}

// Authenticator authenticates requests that came through a Loopback.
func Authenticator() authenticator.Request {
	return authenticator.RequestFunc(func(r *http.Request) (*authenticator.Response, bool, error) {
		who, ok := r.Context().Value(identityKey{}).(user.Info)
		if !ok {
			return nil, false, nil
		}
		return &authenticator.Response{User: who}, true, nil
	})
}

// Is reports whether a request came through a Loopback.
func Is(r *http.Request) bool { return r.Context().Value(identityKey{}) != nil }

type memoryTransport struct {
	loopback *Loopback
	user     user.Info
}

// RoundTrip implements [http.RoundTripper]. It returns when the handler has sent the header; the body is
// streamed.
func (t *memoryTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	h := t.loopback.handler.Load()
	if h == nil {
		return nil, ErrAPINotServing
	}
	ctx, cancel := context.WithCancel(context.WithValue(req.Context(), identityKey{}, t.user))
	if may := t.loopback.may; may != nil && writes(req) {
		holds, changed := may.Holds()
		if !holds {
			cancel()
			return nil, ErrNotLeading
		}
		go fence(ctx, may, changed, cancel)
	}
	in := req.Clone(ctx)
	in.RequestURI = req.URL.RequestURI()
	in.RemoteAddr = "127.0.0.1:0"
	in.Proto, in.ProtoMajor, in.ProtoMinor = "HTTP/2.0", 2, 0
	if in.Host == "" {
		in.Host = req.URL.Host
	}
	if in.Body == nil {
		in.Body = http.NoBody
	}
	w := newMemoryWriter(ctx, cancel)
	go func() {
		defer func() {
			err := io.EOF
			if p := recover(); p != nil {
				// http.ErrAbortHandler is the normal way to abort a response; the API server's own filter has
				// logged other panics.
				err = fmt.Errorf("the API server aborted the response: %v", p)
			}
			w.finish(err)
			in.Body.Close()
		}()
		(*h).ServeHTTP(w, in)
	}()
	if err := w.awaitHeader(); err != nil {
		return nil, err
	}
	return &http.Response{
		Status:        fmt.Sprintf("%d %s", w.status, http.StatusText(w.status)),
		StatusCode:    w.status,
		Proto:         "HTTP/2.0",
		ProtoMajor:    2,
		Header:        w.sent,
		Body:          w,
		ContentLength: -1,
		Request:       req,
	}, nil
}

// maxBuffered is the maximum number of buffered bytes of a response body before the handler's Write blocks.
const maxBuffered = 256 << 10

// memoryWriter is both ends of a response: the handler's ResponseWriter and the client's Body.
type memoryWriter struct {
	ctx    context.Context // the handler's context; cancelled by Close
	cancel context.CancelFunc

	header     http.Header   // the handler's header, until it is sent
	headerSent chan struct{} // closed when status and sent are final
	status     int
	sent       http.Header

	mu     sync.Mutex
	cond   *sync.Cond
	wrote  bool // header was sent
	buf    bytes.Buffer
	err    error // the error of Read when buf is empty; io.EOF after a normal end
	closed bool  // the client has closed the body
}

func newMemoryWriter(ctx context.Context, cancel context.CancelFunc) *memoryWriter {
	w := &memoryWriter{ctx: ctx, cancel: cancel, header: http.Header{}, headerSent: make(chan struct{})}
	w.cond = sync.NewCond(&w.mu)
	// A waiting reader or writer must be woken when the request ends.
	context.AfterFunc(ctx, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.err == nil {
			w.err = context.Cause(ctx)
		}
		w.cond.Broadcast()
	})
	return w
}

// Header implements [http.ResponseWriter].
func (w *memoryWriter) Header() http.Header { return w.header }

// WriteHeader implements [http.ResponseWriter].
func (w *memoryWriter) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(status)
}

func (w *memoryWriter) writeHeader(status int) {
	if w.wrote || status < 200 { // informational responses are dropped
		return
	}
	w.wrote = true
	w.status = status
	w.sent = w.header.Clone()
	close(w.headerSent)
}

// Write implements [http.ResponseWriter]. It blocks while the reader is more
// than maxBuffered bytes behind.
func (w *memoryWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(http.StatusOK)
	for w.buf.Len() >= maxBuffered && w.err == nil && !w.closed {
		w.cond.Wait()
	}
	switch {
	case w.closed:
		return 0, io.ErrClosedPipe
	case w.err != nil:
		return 0, w.err
	}
	w.cond.Broadcast()
	return w.buf.Write(p)
}

// Flush implements [http.Flusher]. Written data can always be read at once.
func (w *memoryWriter) Flush() { w.WriteHeader(http.StatusOK) }

// CloseNotify implements the deprecated http.CloseNotifier, by which the API server recognises a writer that
// supports streaming.
func (w *memoryWriter) CloseNotify() <-chan bool {
	c := make(chan bool, 1)
	context.AfterFunc(w.ctx, func() { c <- true })
	return c
}

// finish is called when the handler has returned, with io.EOF or the error of a panic.
func (w *memoryWriter) finish(err error) {
	w.mu.Lock()
	if !w.wrote && err == io.EOF {
		w.writeHeader(http.StatusOK)
	}
	if w.err == nil {
		if w.ctx.Err() != nil { // the handler returned because the request was cancelled
			err = context.Cause(w.ctx)
		}
		w.err = err
	}
	if !w.wrote {
		w.wrote = true
		close(w.headerSent)
	}
	drained := w.buf.Len() == 0
	w.cond.Broadcast()
	w.mu.Unlock()
	if drained {
		w.cancel()
	}
}

// awaitHeader waits until the header is sent. It returns an error if the handler returns or the request ends
// before.
func (w *memoryWriter) awaitHeader() error {
	select {
	case <-w.headerSent:
	case <-w.ctx.Done():
		// The context also ends after a complete response, which is valid.
		select {
		case <-w.headerSent:
		default:
			w.Close()
			return context.Cause(w.ctx)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.sent == nil {
		return w.err
	}
	return nil
}

// Read implements [io.Reader] for the client.
func (w *memoryWriter) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.buf.Len() == 0 && w.err == nil && !w.closed {
		w.cond.Wait()
	}
	if w.closed {
		return 0, http.ErrBodyReadAfterClose
	}
	if w.buf.Len() > 0 {
		n, _ := w.buf.Read(p)
		w.cond.Broadcast()
		return n, nil
	}
	return 0, w.err
}

// Close implements [io.Closer] for the client. It ends the handler's context.
func (w *memoryWriter) Close() error {
	w.mu.Lock()
	w.closed = true
	w.cond.Broadcast()
	w.mu.Unlock()
	w.cancel()
	return nil
}
