package tunnel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// Reasons for the end of a session.
var (
	ErrDead  = errors.New("the other end of the tunnel is silent")
	ErrEnded = errors.New("the connection of the tunnel has ended")
)

// Options are the times and sizes of a session. The two ends may differ.
type Options struct {
	// Window is the receive window of a stream in bytes: the memory that a stream with a
	// slow reader can hold, and the bytes that can be under way. At least 256 KiB.
	Window uint32
	// Ping is the interval at which this end sends something. Silent is the time without a
	// byte from the other end after which the session is dead: several times the other
	// end's Ping.
	Ping, Silent time.Duration
	// Drain bounds the time that a stream goes on in one direction after the other has
	// ended. Then it is cut, and unread bytes are lost: a slow reader needs a while for a
	// window.
	Drain time.Duration
	// Streams bounds the streams that a node serves at a time.
	Streams int
}

// DefaultOptions returns the options of every kedge.
func DefaultOptions() Options {
	return Options{Window: 1 << 20, Ping: 2 * time.Second, Silent: 7 * time.Second, Drain: 10 * time.Minute, Streams: 1024}
}

// session is one tunnel, at either end.
type session struct {
	mux  *yamux.Session
	conn *watched
	opts Options
	done chan struct{} // closed when the session ends

	ending sync.Once
	mu     sync.Mutex
	err    error // reason for the end
}

// newSession begins a session on a connection. opener is true at the end that opens streams.
func newSession(conn net.Conn, opts Options, log *slog.Logger, opener bool) (*session, error) {
	c := yamux.DefaultConfig()
	c.LogOutput, c.Logger = nil, quiet{log}
	c.MaxStreamWindowSize = opts.Window
	c.EnableKeepAlive = false // see watch
	// A writer waits for its turn, which takes long on a slow connection with many writers.
	// That does not mean that the other end is dead.
	c.ConnectionWriteTimeout = time.Minute
	c.StreamCloseTimeout = opts.Drain
	c.AcceptBacklog = 256
	if opener {
		// Streams that the node has not acknowledged yet; also a bound for streams that
		// a node opens against the protocol.
		c.AcceptBacklog = 64
	}
	s := &session{conn: newWatched(conn), opts: opts, done: make(chan struct{})}
	var err error
	if opener {
		s.mux, err = yamux.Client(s.conn, c)
	} else {
		s.mux, err = yamux.Server(s.conn, c)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("begin a tunnel: %w", err)
	}
	go s.watch()
	return s, nil
}

// close ends the session and all its streams. The first cause counts.
func (s *session) close(cause error) {
	s.ending.Do(func() {
		s.mu.Lock()
		s.err = cause
		s.mu.Unlock()
		close(s.done)  // before streams end, whose readers then look up the cause
		s.conn.Close() // before yamux, which would wait for a stuck writer
		s.mux.Close()
	})
}

// cause returns the reason for the end; valid after done.
func (s *session) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// watch sends pings, and ends the session when nothing is received. Both ends do so
// independently, so that a ping may wait behind other data for long: on a link with one full
// direction, the other direction still shows that the other end lives.
func (s *session) watch() {
	tick := time.NewTicker(s.opts.Ping)
	defer tick.Stop()
	var pinging atomic.Bool
	for last := time.Now(); ; {
		select {
		case <-s.done:
			return
		case <-s.mux.CloseChan():
			s.close(ErrEnded)
			return
		case <-tick.C:
		}
		// A process that was stopped for a while has received nothing, but data may be
		// waiting.
		late := time.Since(last) > 2*s.opts.Ping
		last = time.Now()
		if !late && s.conn.silence() > s.opts.Silent {
			s.close(fmt.Errorf("%w: nothing in %s", ErrDead, s.opts.Silent))
			return
		}
		if pinging.CompareAndSwap(false, true) {
			go func() {
				defer pinging.Store(false)
				_, _ = s.mux.Ping() // any received byte counts, not the answer
			}()
		}
	}
}

// watched is a connection that records when it last received a byte.
type watched struct {
	net.Conn
	begun time.Time
	heard atomic.Int64 // nanoseconds since begun

	// See Write. Between two calls: nothing, or the header of a frame whose body
	// has not come yet.
	frame []byte
}

func newWatched(conn net.Conn) *watched { return &watched{Conn: conn, begun: time.Now()} }

func (w *watched) silence() time.Duration {
	return time.Since(w.begun) - time.Duration(w.heard.Load())
}

// Read implements net.Conn.
func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if n > 0 {
		w.heard.Store(int64(time.Since(w.begun)))
	}
	return n, err
}

// yamux writes the header of a frame and then its body. Header is its size, its
// second byte says of what kind the frame is, and the last four how long the body.
const (
	frameHeader = 12
	frameData   = 0
)

// Write implements net.Conn. The header of a frame with a body waits for the body:
// one record of TLS and one system call for both. yamux writes from one goroutine.
func (w *watched) Write(b []byte) (int, error) {
	if len(w.frame) == 0 {
		if len(b) != frameHeader || b[1] != frameData || b[8]|b[9]|b[10]|b[11] == 0 {
			return w.Conn.Write(b)
		}
		w.frame = append(w.frame, b...)
		return len(b), nil
	}
	w.frame = append(w.frame, b...)
	n, err := w.Conn.Write(w.frame)
	w.frame = w.frame[:0]
	return max(0, n-frameHeader), err
}

// quiet logs yamux's messages, mostly ends of connections, at debug level.
type quiet struct{ log *slog.Logger }

func (q quiet) Print(v ...any)            { q.log.Debug("tunnel", "yamux", fmt.Sprint(v...)) }
func (q quiet) Println(v ...any)          { q.log.Debug("tunnel", "yamux", fmt.Sprint(v...)) }
func (q quiet) Printf(f string, v ...any) { q.log.Debug("tunnel", "yamux", fmt.Sprintf(f, v...)) }

// Stream is a connection through a tunnel.
type stream struct {
	*yamux.Stream
	closed atomic.Bool
}

// Close implements net.Conn: nothing more is sent or received. The other end learns at once
// that nothing more comes, and after Options.Drain that nothing more is read.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	err := s.Stream.Close()
	_ = s.Stream.SetReadDeadline(time.Unix(1, 0)) // wakes readers; never fails
	return err
}

// CloseWrite ends the sending direction. The other direction may go on for Options.Drain.
func (s *stream) CloseWrite() error { return s.Stream.Close() }

// Read implements net.Conn.
func (s *stream) Read(b []byte) (int, error) {
	if s.closed.Load() {
		return 0, net.ErrClosed
	}
	n, err := s.Stream.Read(b)
	if err != nil && s.closed.Load() {
		err = net.ErrClosed
	}
	return n, err
}

// Opener is the server's end of a session.
type Opener struct{ s *session }

// NewOpener begins a session on the connection from [Accept]. It owns conn.
func NewOpener(conn net.Conn, opts Options, log *slog.Logger) (*Opener, error) {
	s, err := newSession(conn, opts, log, true)
	if err != nil {
		return nil, err
	}
	go func() {
		if _, err := s.mux.AcceptStream(); err == nil {
			s.close(fmt.Errorf("%w: a node opens no streams", ErrFrame))
		}
	}()
	return &Opener{s}, nil
}

// Done is closed when the session has ended; Err then returns the reason.
func (o *Opener) Done() <-chan struct{} { return o.s.done }

// Err returns the reason for the end; valid after Done.
func (o *Opener) Err() error { return o.s.cause() }

// Close ends the session and all its connections. Only the first cause counts.
func (o *Opener) Close(cause error) { o.s.close(cause) }

// Dial opens a connection through the node. The error wraps ErrForbidden, ErrUnreachable or
// ErrBusy if the node has refused, ErrFrame if it violates the protocol, and otherwise the
// reason for the end of the session.
func (o *Opener) Dial(ctx context.Context, d Destination) (net.Conn, error) {
	type result struct {
		conn *stream
		err  error
	}
	opened := make(chan result, 1)
	go func() { // yamux may wait here for the node
		m, err := o.s.mux.OpenStream()
		if err != nil {
			opened <- result{err: err}
			return
		}
		c := &stream{Stream: m}
		stop := context.AfterFunc(ctx, func() { c.Close() })
		if err = writeRequest(c, d); err == nil {
			err = readAnswer(c)
		}
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			c.Close()
			opened <- result{err: err}
			return
		}
		opened <- result{conn: c}
	}()
	var r result
	select {
	case r = <-opened:
	case <-ctx.Done():
		go func() {
			if r := <-opened; r.conn != nil {
				r.conn.Close()
			}
		}()
		return nil, fmt.Errorf("open a connection through the tunnel: %w", context.Cause(ctx))
	}
	if r.err == nil {
		return r.conn, nil
	}
	select {
	case <-o.s.done:
		return nil, fmt.Errorf("open a connection through the tunnel: %w", o.s.cause())
	default:
		return nil, r.err
	}
}
