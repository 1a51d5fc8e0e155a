package datastore

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"kedge/datastore/peers"
)

// deadPeer is the time after which the kernel closes a connection that is not acknowledged, as package peers configures it.
const deadPeer = 5 * time.Second

// testLAN is the network of several stores in this process. Their addresses stand for ports of 127.0.0.1, and the LAN knows
// the owner of each, so that it can cut the link between any two. Their loopback addresses are real. All stores are in one
// process and each would listen on all of them, so the LAN listens on all, and finds the store of a connection by its
// source address.
type testLAN struct {
	mu      sync.Mutex
	ports   []*testPort
	hubs    map[netip.Addr]net.Listener
	cut     map[[2]string]bool // both directions of a pair
	streams map[*testConn]struct{}
}

func newTestLAN(tb testing.TB) *testLAN {
	l := &testLAN{hubs: map[netip.Addr]net.Listener{}, cut: map[[2]string]bool{}, streams: map[*testConn]struct{}{}}
	tb.Cleanup(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, h := range l.hubs {
			h.Close()
		}
	})
	return l
}

// testPort is the network of one store.
type testPort struct {
	lan  *testLAN
	name string
	at   netip.AddrPort // changes when the machine moves

	from  netip.Addr // the address on loopback from which the store's raft connects
	heard map[netip.Addr]*testListener
}

func (l *testLAN) port(name string, at netip.AddrPort) *testPort {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := &testPort{lan: l, name: name, at: at, heard: map[netip.Addr]*testListener{}}
	l.ports = append(l.ports, p)
	return p
}

func pair(a, b string) [2]string { return [2]string{min(a, b), max(a, b)} }

// plug restores or cuts the link between two stores. Connections over a cut link carry nothing any more; they are closed
// when the link is restored.
func (l *testLAN) plug(in bool, a, b string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut[pair(a, b)] = !in
	for c := range l.streams {
		if c.ends == pair(a, b) {
			if in {
				c.Conn.Close()
			} else {
				c.freeze()
			}
		}
	}
}

// isolate cuts or restores all links of one store.
func (l *testLAN) isolate(name string, is bool) {
	l.mu.Lock()
	var others []string
	for _, p := range l.ports {
		if p.name != name {
			others = append(others, p.name)
		}
	}
	l.mu.Unlock()
	for _, other := range others {
		l.plug(!is, name, other)
	}
}

func (p *testPort) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	p.lan.mu.Lock()
	var owner string
	for _, other := range p.lan.ports {
		if other.at == to {
			owner = other.name
		}
	}
	ends := pair(p.name, owner)
	reachable := owner != "" && !p.lan.cut[ends]
	p.lan.mu.Unlock()
	if !reachable {
		// A machine that is not reachable sends no refusal either.
		<-ctx.Done()
		return nil, ctx.Err()
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), to.Port()).String())
	if err != nil {
		return nil, err
	}
	c := &testConn{Conn: conn, lan: p.lan, ends: ends, frozen: make(chan struct{}), closed: make(chan struct{})}
	p.lan.mu.Lock()
	defer p.lan.mu.Unlock()
	p.lan.streams[c] = struct{}{}
	if p.lan.cut[ends] {
		c.freeze()
	}
	return c, nil
}

func (p *testPort) ListenLoopback(a, from netip.Addr) (net.Listener, error) {
	p.lan.mu.Lock()
	defer p.lan.mu.Unlock()
	p.from = from
	hub := p.lan.hubs[a]
	if hub == nil {
		var err error
		if hub, err = (peers.KernelNetwork{}).ListenLoopback(a, from); err != nil {
			return nil, err
		}
		p.lan.hubs[a] = hub
		go p.lan.switchTo(a, hub)
	}
	l := &testListener{port: p, address: a, conns: make(chan net.Conn), closed: make(chan struct{})}
	p.heard[a] = l
	return l, nil
}

// switchTo passes connections to the loopback address of a member to the store that has opened them.
func (l *testLAN) switchTo(a netip.Addr, hub net.Listener) {
	for {
		conn, err := hub.Accept()
		if err != nil {
			return
		}
		source := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
		l.mu.Lock()
		var to *testListener
		for _, p := range l.ports {
			if p.from == source {
				to = p.heard[a]
			}
		}
		l.mu.Unlock()
		if to == nil {
			conn.Close()
			continue
		}
		select {
		case to.conns <- conn:
		case <-to.closed:
			conn.Close()
		}
	}
}

type testListener struct {
	port    *testPort
	address netip.Addr
	conns   chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

func (l *testListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *testListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *testListener) Addr() net.Addr { return &net.TCPAddr{} }

// testConn is a connection over a link. After a cut, sent data is lost and nothing is received, until one end closes it, as
// the kernel does after deadPeer.
type testConn struct {
	net.Conn
	lan  *testLAN
	ends [2]string

	freezeOnce, closeOnce sync.Once
	frozen, closed        chan struct{}
}

func (c *testConn) freeze() {
	c.freezeOnce.Do(func() {
		close(c.frozen)
		time.AfterFunc(deadPeer, func() { c.Conn.Close() })
	})
}

func (c *testConn) isFrozen() bool {
	select {
	case <-c.frozen:
		return true
	default:
		return false
	}
}

func (c *testConn) Read(p []byte) (int, error) {
	for {
		n, err := c.Conn.Read(p)
		if !c.isFrozen() || err != nil {
			return n, err
		}
	}
}

func (c *testConn) Write(p []byte) (int, error) {
	if c.isFrozen() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *testConn) Close() error {
	c.closeOnce.Do(func() {
		close(c.closed)
		c.lan.mu.Lock()
		delete(c.lan.streams, c)
		c.lan.mu.Unlock()
	})
	return c.Conn.Close()
}

var nextPort = struct {
	sync.Mutex
	n uint16
}{n: 21000}

// freePort returns a port that is free and is not returned again in this process.
func freePort(tb testing.TB) uint16 {
	tb.Helper()
	nextPort.Lock()
	defer nextPort.Unlock()
	for range 1000 {
		nextPort.n++
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", nextPort.n))
		if err == nil {
			l.Close()
			return nextPort.n
		}
	}
	tb.Fatal("no free port")
	return 0
}
