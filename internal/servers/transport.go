package servers

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Certificate is the client certificate of this machine, in files that are read again after
// changes.
type Certificate struct {
	CertFile, KeyFile string

	mu   sync.Mutex // guards the fields below
	read version    // of the file when it was read
	pair *tls.Certificate
}

// version tells the contents of a file apart. The modification time alone does not: it stays the same for some milliseconds.
// A renewed certificate is another file of the same name.
type version struct {
	modified int64 // nanoseconds since 1970
	inode    uint64
}

// load returns the certificate as it is on disk.
func (c *Certificate) load() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.version(); c.pair == nil || now != c.read {
		pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, err
		}
		c.pair, c.read = &pair, now
	}
	return c.pair, nil
}

// version returns the version of the file, and the zero version if it is missing.
func (c *Certificate) version() version {
	var st unix.Stat_t
	if err := unix.Stat(c.CertFile, &st); err != nil {
		return version{}
	}
	return version{st.Mtim.Nano(), st.Ino}
}

// Transport returns a transport to the API for clients that authenticate by cert. Their URLs
// have [Host] as the host; it stands for another server after a failure. All clients of a
// certificate should share a transport, so that they share a connection.
func (p *Pool) Transport(cert *Certificate) http.RoundTripper {
	return &http.Transport{
		// No proxy: the environment's is for the internet.
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx, cert) },
		TLSClientConfig:     p.config(cert, "h2", "http/1.1"),
		TLSHandshakeTimeout: p.times.Dial,
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     90 * time.Second,
		// Pings detect dead connections that the probes cannot, such as those dropped by
		// a router in between.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second},
	}
}

// From returns a transport to the API whose connections leave from one address of this
// machine, which the server then sees. It is for single requests: each has a connection of
// its own. more are further addresses of servers, because the list may lack addresses of
// from's family.
func (p *Pool) From(from netip.Addr, more []netip.Addr, cert *Certificate) http.RoundTripper {
	network := "tcp4"
	if from.Is6() {
		network = "tcp6"
	}
	d := &net.Dialer{Timeout: p.times.Dial, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	return &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var errs failures
			for _, address := range p.addresses(more) {
				c, err := d.DialContext(ctx, network, address)
				if err == nil {
					return c, nil
				}
				errs = append(errs, err)
			}
			return nil, fmt.Errorf("%w: %w", ErrNoServer, errs)
		},
		TLSClientConfig:     p.config(cert, "http/1.1"),
		TLSHandshakeTimeout: p.times.Dial,
		DisableKeepAlives:   true,
	}
}

// addresses returns the known addresses of servers: those on the list, and more at the ports
// on the list.
func (p *Pool) addresses(more []netip.Addr) []string {
	var out []string
	for _, u := range p.list.All() {
		if address, err := hostPort(u); err == nil {
			out = append(out, address)
		}
	}
	for _, port := range p.list.Ports() {
		for _, a := range more {
			if address := netip.AddrPortFrom(a, port).String(); !slices.Contains(out, address) {
				out = append(out, address)
			}
		}
	}
	return out
}

// closeOutdated closes connections that were made before their certificate was renewed: the
// server would go on to use the old certificate, which expires.
func (p *Pool) closeOutdated() {
	p.mu.Lock()
	var old []*conn
	for _, s := range p.servers {
		for c := range s.conns {
			if c.cert.version() != c.as {
				old = append(old, c)
			}
		}
	}
	p.mu.Unlock()
	for _, c := range old {
		c.Close()
	}
}
