package datastore

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// stream carries the messages of one streaming call between etcd's client and etcd's server in this process,
// behind the two interfaces that gRPC generates for it. Messages cross by pointer: whoever receives one must
// not change it, because the watchers of a key share its events.
//
// The life of a stream is that of its server side, a goroutine that ends when the handler returns. The client
// then sees what was still under way, and after that err.
type stream[Req, Resp any] struct {
	requests  chan *Req
	responses chan *Resp
	halfClose chan struct{} // closed when the client will send no more

	clientCtx context.Context
	admission *admission

	done chan struct{} // closed when the handler has returned
	err  error         // good once done is closed; io.EOF if all went well
}

// responseBuffer lets the server side run ahead a little, as it would into a socket's buffer.
const responseBuffer = 4

// openStream starts handler for a new stream. guard is called with what handler returned, or panicked with.
func openStream[Req, Resp any](g *gate, ctx context.Context, guard func(func() error) error, handler func(*serverStream[Req, Resp]) error) (*clientStream[Req, Resp], error) {
	a, err := g.enterStream(ctx)
	if err != nil {
		return nil, err
	}
	s := &stream[Req, Resp]{
		requests:  make(chan *Req),
		responses: make(chan *Resp, responseBuffer),
		halfClose: make(chan struct{}),
		clientCtx: ctx,
		admission: a,
		done:      make(chan struct{}),
	}
	go func() {
		defer a.leaveStream()
		err := a.reason(guard(func() error { return handler(&serverStream[Req, Resp]{s}) }))
		if err == nil {
			err = io.EOF
		}
		s.err = err
		close(s.done)
	}()
	return &clientStream[Req, Resp]{s}, nil
}

// clientStream is the client's end. It has the methods of grpc.BidiStreamingClient and of
// grpc.ServerStreamingClient. Send and CloseSend must not be called at the same time, as in gRPC.
type clientStream[Req, Resp any] struct{ *stream[Req, Resp] }

func (s *clientStream[Req, Resp]) Context() context.Context { return s.clientCtx }

// Send returns io.EOF when the stream is over, and leaves the reason to Recv, as gRPC does.
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
	// What has arrived comes before any reason to stop.
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

// serverStream is the server's end. It has the methods of grpc.BidiStreamingServer and of
// grpc.ServerStreamingServer.
type serverStream[Req, Resp any] struct{ *stream[Req, Resp] }

func (s *serverStream[Req, Resp]) Context() context.Context { return s.admission.ctx }

func (s *serverStream[Req, Resp]) Send(m *Resp) error {
	select {
	case s.responses <- m:
		return nil
	case <-s.admission.ctx.Done():
		return contextError(s.admission.ctx)
	}
}

func (s *serverStream[Req, Resp]) Recv() (*Req, error) {
	select {
	case m := <-s.requests:
		return m, nil
	case <-s.halfClose:
		return nil, io.EOF
	case <-s.admission.ctx.Done():
		return nil, contextError(s.admission.ctx)
	}
}

func (s *serverStream[Req, Resp]) SetHeader(metadata.MD) error  { return nil }
func (s *serverStream[Req, Resp]) SendHeader(metadata.MD) error { return nil }
func (s *serverStream[Req, Resp]) SetTrailer(metadata.MD)       {}
func (s *serverStream[Req, Resp]) SendMsg(any) error            { return errUntyped }
func (s *serverStream[Req, Resp]) RecvMsg(any) error            { return errUntyped }

// errUntyped is for callers of gRPC's untyped methods; etcd has none left.
var errUntyped = errors.New("datastore streams carry typed messages only")

// contextError is what gRPC returns when a call's context has ended.
func contextError(ctx context.Context) error { return status.FromContextError(ctx.Err()).Err() }
