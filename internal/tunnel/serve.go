package tunnel

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// DialFunc connects to a destination, or returns an error that wraps [ErrForbidden]. It is the
// node's own decision: the server may request every destination.
type DialFunc func(ctx context.Context, d Destination) (net.Conn, error)

// requestWithin bounds the time of a server's request on a new stream, and dialWithin the time
// of the node's connection.
const (
	requestWithin = 10 * time.Second
	dialWithin    = 10 * time.Second
)

// Serve is the node's end of a session: it serves the server's streams until ctx ends, which is
// not an error, or the session ends. It owns conn, and has ended all connections when it
// returns.
func Serve(ctx context.Context, conn net.Conn, dial DialFunc, opts Options, log *slog.Logger) error {
	s, err := newSession(conn, opts, log, false)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { s.close(context.Canceled) })
	defer stop()
	var streams sync.WaitGroup
	defer streams.Wait()
	slots := make(chan struct{}, opts.Streams)
	for {
		m, err := s.mux.AcceptStream()
		if err != nil {
			s.close(ErrEnded)
			if cause := s.cause(); !errors.Is(cause, context.Canceled) {
				return cause
			}
			return nil
		}
		c := &stream{Stream: m}
		select {
		case slots <- struct{}{}:
			streams.Go(func() {
				defer func() { <-slots }()
				serveStream(ctx, c, dial)
			})
		default:
			streams.Go(func() { refuse(c) })
		}
	}
}

// refuse answers without reading the request, which would need a slot.
func refuse(c *stream) {
	_ = writeAnswer(c, ErrBusy)
	c.Close()
}

func serveStream(ctx context.Context, c *stream, dial DialFunc) {
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(requestWithin)) // never fails
	d, err := readRequest(c)
	if err != nil {
		return // a violation of the protocol gets no answer
	}
	_ = c.SetReadDeadline(time.Time{})
	dialling, cancel := context.WithTimeout(ctx, dialWithin)
	defer cancel()
	to, err := dial(dialling, d)
	if err != nil {
		_ = writeAnswer(c, err)
		return
	}
	defer to.Close()
	if writeAnswer(c, nil) == nil {
		join(ctx, c, to)
	}
}

// halfCloser is a connection with half-close.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// join copies bytes both ways until both directions have ended, or one has failed. The end of a
// direction is passed on. Nothing in Kubernetes needs the other direction for long after that,
// and a stream that goes on is cut after Options.Drain.
func join(ctx context.Context, a *stream, b net.Conn) {
	end := func() {
		a.Close()
		b.Close()
	}
	stop := context.AfterFunc(ctx, end)
	defer stop()
	defer end()
	back := make(chan error, 1)
	go func() { back <- pass(a, b) }()
	if pass(b, a) != nil {
		end()
	}
	<-back
}

// pass copies until from ends, and then ends that direction of to. After an error it closes
// both, so that the other direction does not wait for ever.
func pass(to, from net.Conn) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	// Without the methods ReaderFrom and WriterTo of a TCP connection, which allocate a
	// buffer of their own unless both ends are sockets.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, *buf)
	if err == nil {
		if h, ok := to.(halfCloser); ok {
			err = h.CloseWrite()
		} else {
			err = to.Close()
		}
	}
	if err != nil {
		to.Close()
		from.Close()
	}
	return err
}

// buffers have the size in which bytes are copied: large enough that headers and wake-ups cost
// little, and small enough that a busy stream lets others in between.
var buffers = sync.Pool{New: func() any {
	b := make([]byte, 64<<10)
	return &b
}}
