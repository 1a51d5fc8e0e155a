package peers

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
	// handshakeTimeout bounds the TLS handshake, in which a connection authenticates as a member's.
	handshakeTimeout = 3 * time.Second
	// maxHandshakes bounds the handshakes in progress, and maxHandshakesPerSource those from one address. Members need
	// a handful.
	maxHandshakes, maxHandshakesPerSource = 64, 16
	// userTimeout is the time without an acknowledgment after which the kernel closes a connection.
	userTimeout = 5 * time.Second
)

// keepAlive detects within userTimeout that the other end of an idle connection is gone.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: time.Second, Count: 3}

// setUserTimeout makes the kernel close a connection whose data is not acknowledged within userTimeout.
func setUserTimeout(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
	}); e != nil {
		return e
	}
	return err
}

// tlsConfigs returns the TLS settings of both sides. They read the certificate for each handshake, so that it may be
// renewed.
func tlsConfigs(c Config) (server, client *tls.Config, err error) {
	data, err := os.ReadFile(c.CAFile)
	if err != nil {
		return nil, nil, fmt.Errorf("read the peer CA certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, nil, fmt.Errorf("read the peer CA certificate: no certificate in %s", c.CAFile)
	}
	load := func() (*tls.Certificate, error) {
		pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("read the peer certificate: %w", err)
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
		ServerName:           ServerName,
		RootCAs:              pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() },
	}
	return server, client, nil
}

// peerListener is a TLS listener whose connections have authenticated as a member's. Connections in their handshake are
// bounded in number and in time, and do not block others.
type peerListener struct {
	net.Listener
	tls   *tls.Config
	conns chan net.Conn

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu         sync.Mutex         // guards the fields below
	handshakes int                // in progress
	perSource  map[netip.Addr]int // in progress, by source address
	pending    map[net.Conn]struct{}
}

func newPeerListener(l net.Listener, c *tls.Config) *peerListener {
	p := &peerListener{
		Listener: l, tls: c, conns: make(chan net.Conn),
		perSource: map[netip.Addr]int{}, pending: map[net.Conn]struct{}{},
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	p.wg.Go(p.run)
	return p
}

// Accept returns a connection after its handshake.
func (p *peerListener) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Close aborts the handshakes in progress and waits for their end.
func (p *peerListener) Close() error {
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

func (p *peerListener) run() {
	for p.ctx.Err() == nil {
		c, err := p.Listener.Accept()
		if err != nil {
			sleep(p.ctx, 100*time.Millisecond) // for example, the process is out of file descriptors
			continue
		}
		source, ok := p.beginHandshake(c)
		if !ok {
			c.Close()
			continue
		}
		p.wg.Go(func() {
			t := tls.Server(c, p.tls)
			ctx, cancel := context.WithTimeout(p.ctx, handshakeTimeout)
			err := t.HandshakeContext(ctx)
			cancel()
			p.endHandshake(c, source)
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

// beginHandshake reports whether a new connection is within the bounds.
func (p *peerListener) beginHandshake(c net.Conn) (source netip.Addr, ok bool) {
	if a, isTCP := c.RemoteAddr().(*net.TCPAddr); isTCP {
		source = a.AddrPort().Addr().Unmap()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() != nil || p.handshakes >= maxHandshakes || p.perSource[source] >= maxHandshakesPerSource {
		return source, false
	}
	p.handshakes++
	p.perSource[source]++
	p.pending[c] = struct{}{}
	return source, true
}

func (p *peerListener) endHandshake(c net.Conn, source netip.Addr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.handshakes--
	if p.perSource[source]--; p.perSource[source] == 0 {
		delete(p.perSource, source)
	}
	delete(p.pending, c)
}
