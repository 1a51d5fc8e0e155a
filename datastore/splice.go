package datastore

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// splice is one member's address on loopback in this process: what connects there is joined, byte by byte, to a
// connection to where the member is. It sees TLS and cannot look into it, nor need it be trusted.
type splice struct {
	address netip.Addr
	log     *slog.Logger
	listen  func(netip.Addr) (net.Listener, error)
	dial    func(context.Context) (net.Conn, error)

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{} // the far ends that are open
}

const (
	// relisten is how soon an address that is taken is tried again: by another member on the same machine, which
	// joins connections to the same place, until it ends.
	relisten = time.Second
	// maxSplices bounds the connections to one member; raft has about five.
	maxSplices = 64
)

func startSplice(address netip.Addr, log *slog.Logger, listen func(netip.Addr) (net.Listener, error), dial func(context.Context) (net.Conn, error)) *splice {
	s := &splice{address: address, log: log, listen: listen, dial: dial, conns: map[net.Conn]struct{}{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.run)
	return s
}

func (s *splice) close() {
	s.cancel()
	s.cut()
	s.wg.Wait()
}

// cut ends the connections that are open. New ones are made at once.
func (s *splice) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
}

func (s *splice) run() {
	said := false
	for s.ctx.Err() == nil {
		l, err := s.listen(s.address)
		if err == nil {
			s.accept(l)
			continue
		}
		if !said {
			s.log.Debug("address of a member on loopback is taken", "address", s.address, "err", err)
			said = true
		}
		sleep(s.ctx, relisten)
	}
}

func (s *splice) accept(l net.Listener) {
	stop := context.AfterFunc(s.ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	slots := make(chan struct{}, maxSplices)
	for {
		near, err := l.Accept()
		if err != nil {
			if s.ctx.Err() == nil {
				s.log.Warn("accept for a member", "address", s.address, "err", err)
				sleep(s.ctx, relisten)
			}
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			near.Close()
			continue
		}
		s.wg.Go(func() {
			defer func() { <-slots }()
			s.join(near)
		})
	}
}

// join returns when both directions are over. One end that is closed ends the other: raft's connections have no
// use for half of one.
func (s *splice) join(near net.Conn) {
	defer near.Close()
	far, err := s.dial(s.ctx)
	if err != nil {
		return // whoever connected sees the end, and tries again
	}
	defer far.Close()
	s.mu.Lock()
	s.conns[far] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.conns, far)
		s.mu.Unlock()
	}()
	stop := context.AfterFunc(s.ctx, func() { near.Close(); far.Close() })
	defer stop()

	var wg sync.WaitGroup
	for _, way := range []struct{ dst, src net.Conn }{{near, far}, {far, near}} {
		wg.Go(func() {
			_, _ = io.Copy(way.dst, way.src) // the end says it all
			near.Close()
			far.Close()
		})
	}
	wg.Wait()
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
