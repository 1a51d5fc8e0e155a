package peers

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"
)

// loopbackProxy listens on the loopback address of one other member, in this process, and forwards each connection to the
// member's current address. It forwards TLS byte by byte without being able to read it, so it need not be trusted.
type loopbackProxy struct {
	address netip.Addr
	log     *slog.Logger
	listen  func(netip.Addr) (net.Listener, error)
	dial    func(context.Context) (net.Conn, error)

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]struct{} // open connections to the member
}

const (
	// listenRetryInterval is the interval at which the proxy retries to listen on an address that is in use: another
	// member on the same machine may use it, which forwards to the same place, until that member ends.
	listenRetryInterval = time.Second
	// maxProxyConns bounds the connections to one member; raft opens about five.
	maxProxyConns = 64
)

func startLoopbackProxy(address netip.Addr, log *slog.Logger, listen func(netip.Addr) (net.Listener, error), dial func(context.Context) (net.Conn, error)) *loopbackProxy {
	p := &loopbackProxy{address: address, log: log, listen: listen, dial: dial, conns: map[net.Conn]struct{}{}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wg.Go(p.run)
	return p
}

func (p *loopbackProxy) close() {
	p.cancel()
	p.closeConns()
	p.wg.Wait()
}

// closeConns closes the open connections. Raft opens new ones at once.
func (p *loopbackProxy) closeConns() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

func (p *loopbackProxy) run() {
	logged := false
	for p.ctx.Err() == nil {
		l, err := p.listen(p.address)
		if err == nil {
			p.accept(l)
			continue
		}
		if !logged {
			p.log.Debug("the loopback address of a member is in use", "address", p.address, "err", err)
			logged = true
		}
		sleep(p.ctx, listenRetryInterval)
	}
}

func (p *loopbackProxy) accept(l net.Listener) {
	stop := context.AfterFunc(p.ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	slots := make(chan struct{}, maxProxyConns)
	for {
		near, err := l.Accept()
		if err != nil {
			if p.ctx.Err() == nil {
				p.log.Warn("cannot accept a connection to another member of the datastore", "address", p.address, "err", err)
				sleep(p.ctx, listenRetryInterval)
			}
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			near.Close()
			continue
		}
		p.wg.Go(func() {
			defer func() { <-slots }()
			p.forward(near)
		})
	}
}

// forward copies both directions until both have ended. The end of either direction closes the whole connection, because
// raft has no use for a half-closed one.
func (p *loopbackProxy) forward(near net.Conn) {
	defer near.Close()
	far, err := p.dial(p.ctx)
	if err != nil {
		return // raft sees its connection close, and retries
	}
	defer far.Close()
	p.mu.Lock()
	p.conns[far] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.conns, far)
		p.mu.Unlock()
	}()
	stop := context.AfterFunc(p.ctx, func() { near.Close(); far.Close() })
	defer stop()

	var wg sync.WaitGroup
	for _, direction := range []struct{ dst, src net.Conn }{{near, far}, {far, near}} {
		wg.Go(func() {
			_, _ = io.Copy(direction.dst, direction.src) // both ends are closed whatever the error is
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
