// Package lastbytes delivers the last bytes of a connection whose writer closes it while the
// other end goes on sending.
//
// A closed socket answers further packets with a reset, and a reset makes the other end's
// kernel drop the bytes that its program has not read yet. That does not matter for a request
// and its answer. But when a container ends in an exec, a copy or a followed log, its output
// waits in the buffers of several sockets for a slow reader, and meanwhile the client sends a
// ping or typed characters. So:
//
//   - [Linger] is for the end that accepts a connection: after closing, it reads and discards
//     until the other end has closed too.
//   - [Guard] is for the end that connects to a program of the same machine that does not
//     linger: it stops sending once that program has closed.
//
// Packages server, agent, runtime and below import it.
package lastbytes

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// lingerFor bounds the time in which a reader must take the bytes under way when its server is
// done: a few megabytes.
const lingerFor = 10 * time.Minute

// Linger returns a connection whose Close ends its own direction and returns. The connection
// is closed when the other end has closed.
func Linger(conn net.Conn) net.Conn { return &lingering{Conn: conn} }

type lingering struct {
	net.Conn
	closed atomic.Bool
}

// Read implements net.Conn. A call that waits when the connection is closed goes on until the
// other end closes, and discards what it reads.
func (l *lingering) Read(b []byte) (int, error) {
	if l.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := l.Conn.Read(b)
	if l.closed.Load() {
		return 0, net.ErrClosed
	}
	return n, err
}

// Write implements net.Conn.
func (l *lingering) Write(b []byte) (int, error) {
	if l.closed.Load() {
		return 0, net.ErrClosed
	}
	return l.Conn.Write(b)
}

// Close implements net.Conn.
func (l *lingering) Close() error {
	if l.closed.Swap(true) {
		return net.ErrClosed
	}
	go func() {
		defer l.Conn.Close()
		if err := closeWrite(l.Conn); err != nil {
			return
		}
		if err := l.Conn.SetReadDeadline(time.Now().Add(lingerFor)); err != nil {
			return
		}
		_, _ = io.Copy(io.Discard, struct{ io.Reader }{l.Conn}) // only its end matters
	}()
	return nil
}

// closeWrite ends one direction, of TLS and of the connection below it.
func closeWrite(conn net.Conn) error {
	if t, ok := conn.(*tls.Conn); ok {
		_ = t.CloseWrite() // the connection's own end comes next
		conn = t.NetConn()
	}
	h, ok := conn.(interface{ CloseWrite() error })
	if !ok {
		return http.ErrNotSupported
	}
	return h.CloseWrite()
}

// Handler makes the connections linger that next hijacks from the HTTP server.
func Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, ok := w.(http.Hijacker)
		f, flushes := w.(http.Flusher)
		if !ok || !flushes || r.Header.Get("Upgrade") == "" {
			next.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(&response{w, f, h}, r)
	})
}

// response has the methods that handlers of upgrade requests need in a response of HTTP/1.1.
type response struct {
	http.ResponseWriter
	http.Flusher
	hijacker http.Hijacker
}
