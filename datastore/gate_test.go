package datastore

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/internal/test/await"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/raft/v3"
)

func isStopped(err error) bool {
	return errors.Is(err, rpctypes.ErrStopped) || errors.Is(err, rpctypes.ErrGRPCStopped)
}

// Over gRPC an interceptor does this. Without it, watches on a member that is cut off stay open and deliver nothing.
func TestGateEndsStreamsWithoutLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var leader atomic.Bool
		leader.Store(true)
		g := newGate(func() uint64 {
			if leader.Load() {
				return 1
			}
			return raft.None
		})
		const interval = time.Second
		go g.watchLeader(interval)
		defer g.close()

		open := func(ctx context.Context) *clientStream[int, int] {
			s, err := openStream(g, ctx, runGuarded, func(s *serverStream[int, int]) error {
				<-s.Context().Done()
				return s.Context().Err()
			})
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		picky, easy := open(clientv3.WithRequireLeader(t.Context())), open(t.Context())

		// An election that lasts slightly less than two timeouts ends no stream.
		leader.Store(false)
		time.Sleep(2*interval - interval/2)
		leader.Store(true)
		time.Sleep(3 * interval)
		synctest.Wait()
		if ended(picky) {
			t.Fatal("a short election ended a stream")
		}

		// New streams are refused at once.
		leader.Store(false)
		if _, err := g.enterStream(clientv3.WithRequireLeader(t.Context())); err != rpctypes.ErrGRPCNoLeader {
			t.Errorf("new stream: %v, want no leader", err)
		}
		if _, err := g.enter(clientv3.WithRequireLeader(t.Context())); err != rpctypes.ErrGRPCNoLeader {
			t.Errorf("new call: %v, want no leader", err)
		}
		time.Sleep(3 * interval)
		synctest.Wait()
		if !ended(picky) {
			t.Fatal("the stream is open after three election timeouts without a leader")
		}
		if _, err := picky.Recv(); err != rpctypes.ErrGRPCNoLeader {
			t.Errorf("stream ended with %v, want no leader", err)
		}
		if ended(easy) {
			t.Error("a stream that requires no leader ended")
		}
	})
}

// Calls that require a majority end when there is no leader. Calls from before an election end soon after it.
func TestGateEndsCallsInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var leader atomic.Uint64
		leader.Store(1)
		g := newGate(leader.Load)
		const election = time.Second
		go g.watchLeader(election)
		defer g.close()
		enter := func() *inflightCall {
			a, err := g.enterCall(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return a
		}
		first := enter()
		time.Sleep(3 * election)
		if first.ctx.Err() != nil {
			t.Error("a call under the first leader was ended")
		}
		first.leaveCall()

		// After an election, calls in flight have half a second under the new leader.
		before := enter()
		leader.Store(raft.None)
		time.Sleep(election)
		between := enter()
		leader.Store(2)
		time.Sleep(election / 3)
		after := enter()
		if before.ctx.Err() != nil || between.ctx.Err() != nil {
			t.Error("calls ended with the election")
		}
		time.Sleep(election)
		for _, a := range []*inflightCall{before, between} {
			if err := a.reason(nil); err != rpctypes.ErrGRPCTimeoutDueToLeaderFail {
				t.Errorf("a call from before the election ended with %v", err)
			}
			a.leaveCall()
		}
		time.Sleep(5 * election)
		if after.ctx.Err() != nil {
			t.Error("a call under the current leader was ended")
		}

		// Without a leader for long, calls end.
		leader.Store(raft.None)
		time.Sleep(3 * election)
		if err := after.reason(nil); err != rpctypes.ErrGRPCNoLeader {
			t.Errorf("a call without a leader ended with %v", err)
		}
		after.leaveCall()
		if _, err := g.enterCall(t.Context()); err != rpctypes.ErrGRPCNoLeader {
			t.Errorf("a new call without a leader: %v", err)
		}
		leader.Store(2)
		time.Sleep(election)
		enter().leaveCall()
	})
}

// The same through etcd's client and watch server: Kubernetes looks for this error.
func TestWatchFailsWithoutLeader(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	watch := c.Watch(clientv3.WithRequireLeader(t.Context()), "/a/", clientv3.WithCreatedNotify())
	<-watch
	s.transport.Load().gate.endLeaderless()
	resp, ok := <-watch
	if !ok || !errors.Is(resp.Err(), rpctypes.ErrNoLeader) {
		t.Errorf("watch got %v, %v, want %v", resp, ok, rpctypes.ErrNoLeader)
	}
}

func TestGateCloseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(alwaysLed)
		a, err := g.enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		closed := make(chan struct{})
		go func() { g.close(); close(closed) }()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("closed during a call")
		default:
		}
		if a.ctx.Err() == nil || a.reason(a.ctx.Err()) != rpctypes.ErrGRPCStopped {
			t.Errorf("the call ended with %v", a.reason(a.ctx.Err()))
		}
		if _, err := g.enter(t.Context()); err != rpctypes.ErrGRPCStopped {
			t.Errorf("a new call got %v", err)
		}
		a.leave()
		<-closed
	})
}

// Messages that the server sent before it returned arrive in order, before its error.
func TestStreamDeliversBeforeError(t *testing.T) {
	g := newGate(alwaysLed)
	defer g.close()
	broken := errors.New("broken")
	for _, tc := range []struct{ returned, want error }{{nil, io.EOF}, {broken, broken}} {
		s, err := openStream(g, t.Context(), runGuarded, func(s *serverStream[int, int]) error {
			for i := range responseBuffer {
				if err := s.Send(&i); err != nil {
					return err
				}
			}
			return tc.returned
		})
		if err != nil {
			t.Fatal(err)
		}
		<-s.done
		for want := range responseBuffer {
			if got, err := s.Recv(); err != nil || *got != want {
				t.Errorf("received %v, %v, want %d", got, err, want)
			}
		}
		if _, err := s.Recv(); err != tc.want {
			t.Errorf("ended with %v, want %v", err, tc.want)
		}
		if err := s.Send(new(int)); err != io.EOF {
			t.Errorf("send after the end: %v, want EOF", err)
		}
	}
}

// A client that cancels gets the error of its context, and the server side ends.
func TestStreamCancel(t *testing.T) {
	g := newGate(alwaysLed)
	defer g.close()
	ctx, cancel := context.WithCancel(t.Context())
	s, err := openStream(g, ctx, runGuarded, func(s *serverStream[int, int]) error {
		for {
			if err := s.Send(new(int)); err != nil {
				return err
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	await.True(t, "the stream ends with its context", func() bool {
		_, err = s.Recv()
		return err != nil
	})
	if err := clientv3.ContextError(ctx, err); !errors.Is(err, context.Canceled) {
		t.Errorf("after its context: %v", err)
	}
	<-s.done
}

func TestStreamHalfClose(t *testing.T) {
	g := newGate(alwaysLed)
	defer g.close()
	s, err := openStream(g, t.Context(), runGuarded, func(s *serverStream[int, int]) error {
		sum := 0
		for {
			n, err := s.Recv()
			if err == io.EOF {
				return s.Send(&sum)
			}
			if err != nil {
				return err
			}
			sum += *n
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 4 {
		if err := s.Send(&n); err != nil {
			t.Fatal(err)
		}
	}
	s.CloseSend()
	s.CloseSend()
	if sum, err := s.Recv(); err != nil || *sum != 6 {
		t.Errorf("sum %v, %v", sum, err)
	}
}

func alwaysLed() uint64 { return 1 }

func runGuarded(f func() error) error { return f() }

func ended(s *clientStream[int, int]) bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}
