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

// DialFunc connects to a destination, or wraps [ErrForbidden] where the node does not.
// It is the node's own judgement: the server may ask for anything.
type DialFunc func(ctx context.Context, d Destination) (net.Conn, error)

// requestWithin is how long a server may take to say where a stream goes, and
// dialWithin a node to get there.
const (
	requestWithin = 10 * time.Second
	dialWithin    = 10 * time.Second
)

// Serve is the node's end of a session: it answers the server's streams until ctx
// ends, which is no error, or the session does. It owns conn, and has ended all
// connections when it returns.
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

// refuse answers without having read what was asked: that would need a slot.
func refuse(c *stream) {
	_ = writeAnswer(c, ErrBusy)
	c.Close()
}

func serveStream(ctx context.Context, c *stream, dial DialFunc) {
	defer c.Close()
	_ = c.SetReadDeadline(time.Now().Add(requestWithin)) // never fails
	d, err := readRequest(c)
	if err != nil {
		return // who does not follow the protocol gets no answer in it
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

// halfCloser is a connection of which one direction can end.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// join passes bytes both ways until both directions have ended, or one has failed.
// The end of one direction is passed on. Nothing of Kubernetes needs that the other
// then goes on for long, and a stream in which it does is cut after Options.Drain.
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

// pass copies until from ends, and then says so to to. After an error both ends are
// closed, so that the other direction does not wait for ever.
func pass(to, from net.Conn) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	// Not the methods ReaderFrom and WriterTo of a TCP connection: with anything but
	// sockets they make a buffer of their own.
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

// buffers are of the size in which bytes are passed on: large enough that headers and
// wake-ups cost little, and small enough that a stream with much to send lets others
// come in between.
var buffers = sync.Pool{New: func() any {
	b := make([]byte, 64<<10)
	return &b
}}
