package datastore

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// stream carries the messages of one streaming call between etcd's client and etcd's server in this process, behind the
// two interfaces that gRPC generates for it. Messages cross by pointer. A receiver must not change them, because the
// watchers of a key share its events.
//
// A stream lives as long as its server side, a goroutine that ends when the handler returns. After that the client
// receives the messages that were still in flight, and then err.
type stream[Req, Resp any] struct {
	requests  chan *Req
	responses chan *Resp
	halfClose chan struct{} // closed by CloseSend

	clientCtx context.Context
	call      *inflightCall

	done chan struct{} // closed when the handler has returned
	err  error         // good once done is closed; io.EOF if the handler succeeded
}

// responseBuffer is the number of responses that the server side may send ahead, as into the buffer of a socket.
const responseBuffer = 4

// openStream starts handler for a new stream. guard calls handler, and handles its panics.
func openStream[Req, Resp any](g *gate, ctx context.Context, guard func(func() error) error, handler func(*serverStream[Req, Resp]) error) (*clientStream[Req, Resp], error) {
	c, err := g.enterStream(ctx)
	if err != nil {
		return nil, err
	}
	s := &stream[Req, Resp]{
		requests:  make(chan *Req),
		responses: make(chan *Resp, responseBuffer),
		halfClose: make(chan struct{}),
		clientCtx: ctx,
		call:      c,
		done:      make(chan struct{}),
	}
	go func() {
		defer c.leaveStream()
		err := c.reason(guard(func() error { return handler(&serverStream[Req, Resp]{s}) }))
		if err == nil {
			err = io.EOF
		}
		s.err = err
		close(s.done)
	}()
	return &clientStream[Req, Resp]{s}, nil
}

// clientStream is the client's end. It has the methods of grpc.BidiStreamingClient and grpc.ServerStreamingClient. As in
// gRPC, Send and CloseSend must not be called concurrently.
type clientStream[Req, Resp any] struct{ *stream[Req, Resp] }

func (s *clientStream[Req, Resp]) Context() context.Context { return s.clientCtx }

// Send returns io.EOF when the stream is over. As in gRPC, Recv returns the reason.
func (s *clientStream[Req, Resp]) Send(m *Req) error {
	select {
	case s.requests <- m:
		return nil
	case <-s.done:
		return io.EOF
	case <-s.clientCtx.Done():
		return contextError(s.clientCtx)
	}
}

func (s *clientStream[Req, Resp]) Recv() (*Resp, error) {
	// Messages that have arrived come before the end of the stream.
	select {
	case m := <-s.responses:
		return m, nil
	default:
	}
	select {
	case m := <-s.responses:
		return m, nil
	case <-s.done:
	case <-s.clientCtx.Done():
		return nil, contextError(s.clientCtx)
	}
	select {
	case m := <-s.responses:
		return m, nil
	default:
		return nil, s.err
	}
}

func (s *clientStream[Req, Resp]) CloseSend() error {
	select {
	case <-s.halfClose:
	default:
		close(s.halfClose)
	}
	return nil
}

func (s *clientStream[Req, Resp]) Header() (metadata.MD, error) { return nil, nil }
func (s *clientStream[Req, Resp]) Trailer() metadata.MD         { return nil }
func (s *clientStream[Req, Resp]) SendMsg(any) error            { return errUntyped }
func (s *clientStream[Req, Resp]) RecvMsg(any) error            { return errUntyped }

// serverStream is the server's end. It has the methods of grpc.BidiStreamingServer and grpc.ServerStreamingServer.
type serverStream[Req, Resp any] struct{ *stream[Req, Resp] }

func (s *serverStream[Req, Resp]) Context() context.Context { return s.call.ctx }

func (s *serverStream[Req, Resp]) Send(m *Resp) error {
	select {
	case s.responses <- m:
		return nil
	case <-s.call.ctx.Done():
		return contextError(s.call.ctx)
	}
}

func (s *serverStream[Req, Resp]) Recv() (*Req, error) {
	select {
	case m := <-s.requests:
		return m, nil
	case <-s.halfClose:
		return nil, io.EOF
	case <-s.call.ctx.Done():
		return nil, contextError(s.call.ctx)
	}
}

func (s *serverStream[Req, Resp]) SetHeader(metadata.MD) error  { return nil }
func (s *serverStream[Req, Resp]) SendHeader(metadata.MD) error { return nil }
func (s *serverStream[Req, Resp]) SetTrailer(metadata.MD)       {}
func (s *serverStream[Req, Resp]) SendMsg(any) error            { return errUntyped }
func (s *serverStream[Req, Resp]) RecvMsg(any) error            { return errUntyped }

// errUntyped is the error of gRPC's untyped methods, which etcd does not call any more.
var errUntyped = errors.New("datastore streams carry typed messages only")

// contextError returns the error of gRPC for a call whose context has ended.
func contextError(ctx context.Context) error { return status.FromContextError(ctx.Err()).Err() }
