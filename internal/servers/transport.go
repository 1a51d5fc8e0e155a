package servers

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// Certificate is who this machine is towards the servers: files that are read again
// when they have changed.
type Certificate struct {
	CertFile, KeyFile string

	mu   sync.Mutex // guards what follows
	read time.Time  // the file's time of change when it was read
	pair *tls.Certificate
}

// load returns the certificate as it is on disk.
func (c *Certificate) load() (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if at := c.changed(); c.pair == nil || !at.Equal(c.read) {
		pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
		if err != nil {
			return nil, err
		}
		c.pair, c.read = &pair, at
	}
	return c.pair, nil
}

// changed is when the file was written, and the zero time if there is none.
func (c *Certificate) changed() time.Time {
	st, err := os.Stat(c.CertFile)
	if err != nil {
		return time.Time{}
	}
	return st.ModTime()
}

// Transport is the way to the API for clients that act as the holder of cert. Their
// URLs name [Host]; which server that is changes when one fails. All clients of one
// certificate should share one transport: they then share a connection.
func (p *Pool) Transport(cert *Certificate) http.RoundTripper {
	return &http.Transport{
		// No proxy: what the environment names is for the internet.
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx, cert) },
		TLSClientConfig:     p.config(cert, "h2", "http/1.1"),
		TLSHandshakeTimeout: p.times.Dial,
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     90 * time.Second,
		// For connections of which the probes know nothing, such as one that a router
		// in between has forgotten.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 10 * time.Second, PingTimeout: 5 * time.Second},
	}
}

// closeOutdated closes connections that were made with a certificate that has been
// renewed: a server goes by the old one, which expires.
func (p *Pool) closeOutdated() {
	p.mu.Lock()
	var old []*conn
	for _, s := range p.servers {
		for c := range s.conns {
			if !c.cert.changed().Equal(c.as) {
				old = append(old, c)
			}
		}
	}
	p.mu.Unlock()
	for _, c := range old {
		c.Close()
	}
}
