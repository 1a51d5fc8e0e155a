package datastore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// handshakeTime is how long a connection may take to prove that it comes from a member.
	handshakeTime = 3 * time.Second
	// maxHandshakes and maxHandshakesEach bound the connections that have not proved it, of all and of one
	// address. Members need a handful.
	maxHandshakes, maxHandshakesEach = 64, 16
	// deadPeer is after how long without an answer the kernel gives a connection up.
	deadPeer = 5 * time.Second
)

// keepAlive finds out in deadPeer that an idle connection leads nowhere.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: time.Second, Count: 3}

// giveUp makes the kernel give up on data that is not acknowledged.
func giveUp(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadPeer.Milliseconds()))
	}); e != nil {
		return e
	}
	return err
}

// peerTLS has both sides' settings. The certificate is read for each handshake, so that it may be renewed.
func peerTLS(c PeerConfig) (server, client *tls.Config, err error) {
	data, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, nil, fmt.Errorf("peers' authority: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, nil, fmt.Errorf("peers' authority: no certificate in %s", c.CAFile)
	}
	load := func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("certificate for peers: %w", err)
		}
		return &pair, nil
	}
	if _, err := load(); err != nil {
		return nil, nil, err
	}
	server = &tls.Config{
		MinVersion:             tls.VersionTLS13,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		ClientCAs:              pool,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return load() },
		SessionTicketsDisabled: true,
	}
	client = &tls.Config{
		MinVersion:           tls.VersionTLS13,
		ServerName:           PeerServerName,
		RootCAs:              pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() },
	}
	return server, client, nil
}

// proven is a listener whose connections have proved that they come from a member. Those that have not get
// little time and little room, and hold nobody up.
type proven struct {
	net.Listener
	tls   *tls.Config
	conns chan net.Conn

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex         // guards what follows
	total   int                // handshakes under way
	each    map[netip.Addr]int // of that, by source
	pending map[net.Conn]struct{}
}

func newProven(l net.Listener, c *tls.Config) *proven {
	p := &proven{
		Listener: l, tls: c, conns: make(chan net.Conn),
		each: map[netip.Addr]int{}, pending: map[net.Conn]struct{}{},
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wg.Go(p.run)
	return p
}

// Accept returns connections after their handshake.
func (p *proven) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close waits for the handshakes under way, which it ends.
func (p *proven) Close() error {
	p.cancel()
	err := p.Listener.Close()
	p.mu.Lock()
	for c := range p.pending {
		c.Close()
	}
	p.mu.Unlock()
	p.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (p *proven) run() {
	for p.ctx.Err() == nil {
		c, err := p.Listener.Accept()
		if err != nil {
			sleep(p.ctx, 100*time.Millisecond) // out of descriptors, say
			continue
		}
		source, ok := p.enter(c)
		if !ok {
			c.Close()
			continue
		}
		p.wg.Go(func() {
			t := tls.Server(c, p.tls)
			ctx, cancel := context.WithTimeout(p.ctx, handshakeTime)
			err := t.HandshakeContext(ctx)
			cancel()
			p.leave(c, source)
			if err != nil {
				c.Close()
				return
			}
			select {
			case p.conns <- t:
			case <-p.ctx.Done():
				c.Close()
			}
		})
	}
}

func (p *proven) enter(c net.Conn) (source netip.Addr, ok bool) {
	if a, isTCP := c.RemoteAddr().(*net.TCPAddr); isTCP {
		source = a.AddrPort().Addr().Unmap()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil || p.total >= maxHandshakes || p.each[source] >= maxHandshakesEach {
		return source, false
	}
	p.total++
	p.each[source]++
	p.pending[c] = struct{}{}
	return source, true
}

func (p *proven) leave(c net.Conn, source netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.total--
	if p.each[source]--; p.each[source] == 0 {
		delete(p.each, source)
	}
	delete(p.pending, c)
}
