package servers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Host is the name of every server in URLs and in TLS. The certificate of each server has it,
// and the servers' authority signs it for no other machine.
const Host = "kubernetes.default.svc"

// ErrNoServer is wrapped when no server can be connected to.
var ErrNoServer = errors.New("no server of the cluster answers")

// Times are the intervals and limits of a pool's probes.
type Times struct {
	Probe  time.Duration // interval of probes of the current server
	Others time.Duration // interval of probes of other servers, while the current server works
	Answer time.Duration // limit for an answer
	Dial   time.Duration // limit for a connection
}

// DefaultTimes detect a silent server within Probe and twice Answer.
func DefaultTimes() Times {
	return Times{Probe: time.Second, Others: 5 * time.Second, Answer: time.Second, Dial: 3 * time.Second}
}

// Pool connects to a working server. It is the component that probes the servers.
type Pool struct {
	list  *List
	roots *x509.CertPool
	times Times
	log   *slog.Logger

	mu      sync.Mutex // guards the fields below
	servers map[string]*server
	current string // URL of the current server; empty at first

	open opened
}

// opened is the set of open connections. It has a lock of its own, because connections are
// also closed with the pool's lock held.
type opened struct {
	mu    sync.Mutex // guards conns
	conns map[*tracked]struct{}
}

// server is the state of a server.
type server struct {
	url     string
	client  *http.Client // for probes
	probed  time.Time
	probing bool
	tried   bool  // a probe or connection has finished; err is its result
	err     error // nil if the server works, or was not tried yet
	conns   map[*conn]struct{}
}

// New makes a pool of the servers on the list. caFile is the authority of their
// certificates.
func New(list *List, caFile string, times Times, log *slog.Logger) (*Pool, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("read the authority of the servers: %w", err)
	}
	p := &Pool{list: list, roots: x509.NewCertPool(), times: times, log: log, servers: map[string]*server{}, open: opened{conns: map[*tracked]struct{}{}}}
	if !p.roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("read the authority of the servers: no certificate in %s", caFile)
	}
	return p, nil
}

// get returns the state of a server. Caller holds mu.
func (p *Pool) get(url string) *server {
	s := p.servers[url]
	if s == nil {
		s = &server{url: url, conns: map[*conn]struct{}{}}
		s.client = &http.Client{
			Timeout: p.times.Answer,
			Transport: &http.Transport{
				DialTLSContext:      func(ctx context.Context, _, _ string) (net.Conn, error) { return p.DialTLS(ctx, url, nil) },
				MaxIdleConnsPerHost: 1,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		p.servers[url] = s
	}
	return s
}

// Name implements lifecycle.Component.
func (p *Pool) Name() string { return "servers" }

// Run implements lifecycle.Component. It is ready at once: a node starts without a server too.
func (p *Pool) Run(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(p.times.Probe)
	defer tick.Stop()
	var probes sync.WaitGroup
	defer probes.Wait()
	for {
		p.closeOutdated()
		for _, s := range p.due() {
			probes.Go(func() { p.probe(ctx, s) })
		}
		select {
		case <-ctx.Done():
			p.mu.Lock()
			defer p.mu.Unlock()
			for _, s := range p.servers {
				s.client.CloseIdleConnections()
			}
			return nil
		case <-tick.C:
		}
	}
}

// due returns the servers that are to be probed. A single server is probed at the interval of
// the others, since there is no server to fail over to.
func (p *Pool) due() []*server {
	all := p.list.All()
	p.mu.Lock()
	defer p.mu.Unlock()
	for url, s := range p.servers {
		if slices.Contains(all, url) || s.probing {
			continue
		}
		s.err = errLeft // it is not probed any more
		if len(s.conns) == 0 && url != p.current {
			s.client.CloseIdleConnections()
			delete(p.servers, url)
		}
	}
	looking := p.current == "" || p.get(p.current).err != nil
	var out []*server
	for _, url := range all {
		s := p.get(url)
		every := p.times.Others
		if looking || len(all) > 1 && (url == p.current || len(s.conns) > 0) {
			every = p.times.Probe / 2 // at each tick
		}
		if !s.probing && time.Since(s.probed) >= every {
			s.probing = true
			out = append(out, s)
		}
	}
	return out
}

var errLeft = errors.New("no longer a server of the cluster")

// probe asks a server whether it is ready, and repeats an unanswered request once, because one
// packet can be lost.
func (p *Pool) probe(ctx context.Context, s *server) {
	err := p.request(ctx, s)
	if err != nil && ctx.Err() == nil && !definite(err) {
		err = p.request(ctx, s)
	}
	if ctx.Err() == nil {
		p.record(s, err)
	}
	p.mu.Lock()
	s.probing, s.probed = false, time.Now()
	p.mu.Unlock()
}

func (p *Pool) request(ctx context.Context, s *server) error {
	err := ProbeReady(ctx, s.client, Host)
	if err != nil && !errors.As(err, &notReady{}) {
		s.client.CloseIdleConnections()
	}
	return err
}

// record records the result of a probe. Connections to failed servers are closed when another
// server works; otherwise watches would stay on connections that carry nothing any more.
func (p *Pool) record(s *server, err error) {
	p.mu.Lock()
	if !s.tried || (err == nil) != (s.err == nil) {
		p.log.Debug("a server was probed", "server", s.url, "err", err)
	}
	s.tried, s.err = true, err
	var moved []*conn
	if next := p.good(); next != "" {
		for _, s := range p.servers {
			if s.err != nil {
				for c := range s.conns {
					moved = append(moved, c)
				}
			}
		}
		if cur := p.servers[p.current]; cur == nil || cur.err != nil {
			p.use(next)
		}
	}
	p.mu.Unlock()
	for _, c := range moved {
		c.Close()
	}
}

// use makes another server the current one. Caller holds mu.
func (p *Pool) use(next string) {
	if cur := p.servers[p.current]; cur != nil {
		p.log.Warn("a server does not work; going on with another", "server", cur.url, "err", cur.err, "next", next)
	}
	p.current = next
}

// good is a server that works, and empty if none is known to. Those that the
// administrator has named are the last resort. Caller holds mu.
func (p *Pool) good() string {
	works := func(url string) bool {
		s := p.servers[url]
		return s != nil && s.tried && s.err == nil
	}
	known, _ := p.list.Known()
	for _, urls := range [][]string{known, p.list.Fallback()} {
		if urls = slices.DeleteFunc(urls, func(url string) bool { return !works(url) }); len(urls) > 0 {
			return urls[rand.N(len(urls))]
		}
	}
	return ""
}

// Describe implements lifecycle.Describer: the server in use, and of how many.
func (p *Pool) Describe() string {
	current := p.Current()
	if current == "" {
		return ""
	}
	return fmt.Sprintf("%s of %d", strings.TrimPrefix(current, "https://"), len(p.list.All()))
}

// Check implements lifecycle.Checker.
func (p *Pool) Check(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	cur := p.servers[p.current]
	switch {
	case cur == nil || !cur.tried && cur.err == nil:
		return ErrNoServer // no server has answered yet that it is ready
	case cur.err != nil:
		return fmt.Errorf("%w; %s: %w", ErrNoServer, cur.url, cur.err)
	}
	return nil
}

// Current returns the URL of the current server, and "" before the first.
func (p *Pool) Current() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current
}

// order returns the servers in the order in which connections are tried.
func (p *Pool) order() []string {
	all := p.list.All()
	known, _ := p.list.Known()
	p.mu.Lock()
	defer p.mu.Unlock()
	rank := func(url string) int {
		s := p.servers[url]
		switch {
		case url == p.current && (s == nil || s.err == nil):
			return 0
		case s != nil && s.tried && s.err == nil:
			return 1
		case s == nil || !s.tried:
			return 2
		}
		return 3
	}
	// The list is sorted, and without this all agents would start with the same server.
	rand.Shuffle(min(len(known), len(all)), func(i, j int) { all[i], all[j] = all[j], all[i] })
	slices.SortStableFunc(all, func(a, b string) int { return rank(a) - rank(b) })
	return all
}

// conn is a connection that is closed when its server fails.
type conn struct {
	net.Conn
	pool *Pool
	to   *server
	cert *Certificate
	as   version // of the certificate's file at the time of the connection
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.pool.mu.Lock()
	delete(c.to.conns, c)
	c.pool.mu.Unlock()
	return c.Conn.Close()
}

// failures are the errors of connections to several servers, in one line.
type failures []error

// Error implements error.
func (f failures) Error() string {
	var texts []string
	for _, err := range f {
		texts = append(texts, err.Error())
	}
	return strings.Join(texts, "; ")
}

// Unwrap implements errors.Is.
func (f failures) Unwrap() []error { return f }

// dial connects to the first server that accepts a connection.
func (p *Pool) dial(ctx context.Context, cert *Certificate) (net.Conn, error) {
	as := cert.version()
	var errs failures
	for _, url := range p.order() {
		inner, err := p.dialTCP(ctx, url)
		if err != nil {
			errs = append(errs, err)
			if ctx.Err() != nil {
				break
			}
			p.mu.Lock()
			s := p.get(url)
			s.tried, s.err = true, err // a probe may find the opposite
			p.mu.Unlock()
			continue
		}
		p.mu.Lock()
		s := p.get(url)
		if cur := p.servers[p.current]; url != p.current && (cur == nil || cur.err != nil) {
			p.use(url)
		}
		c := &conn{Conn: inner, pool: p, to: s, cert: cert, as: as}
		s.conns[c] = struct{}{}
		p.mu.Unlock()
		return c, nil
	}
	return nil, fmt.Errorf("%w: %w", ErrNoServer, errs)
}

func (p *Pool) dialTCP(ctx context.Context, url string) (net.Conn, error) {
	address, err := hostPort(url)
	if err != nil {
		return nil, err
	}
	inner, err := (&net.Dialer{Timeout: p.times.Dial}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	c := &tracked{inner, &p.open}
	p.open.mu.Lock()
	p.open.conns[c] = struct{}{}
	p.open.mu.Unlock()
	return c, nil
}

// tracked is a connection that is closed when this machine loses the connection's local
// address.
type tracked struct {
	net.Conn
	in *opened
}

// Close implements net.Conn.
func (c *tracked) Close() error {
	c.in.mu.Lock()
	delete(c.in.conns, c)
	c.in.mu.Unlock()
	return c.Conn.Close()
}

// Moved closes the connections from addresses that this machine does not have any more, and
// probes all servers anew. Such connections carry nothing any more and report no error.
func (p *Pool) Moved(has func(netip.Addr) bool) {
	var dead []*tracked
	p.open.mu.Lock()
	for c := range p.open.conns {
		if a, ok := c.LocalAddr().(*net.TCPAddr); ok && !has(a.AddrPort().Addr().Unmap().WithZone("")) {
			dead = append(dead, c)
		}
	}
	p.open.mu.Unlock()
	p.mu.Lock()
	for _, s := range p.servers {
		s.probed = time.Time{}
	}
	p.mu.Unlock()
	for _, c := range dead {
		c.Close()
	}
}

// DialTLS connects to the server at a URL and to no other, for HTTP/1.1. cert identifies this
// machine; nil is for an anonymous connection.
func (p *Pool) DialTLS(ctx context.Context, url string, cert *Certificate) (net.Conn, error) {
	inner, err := p.dialTCP(ctx, url)
	if err != nil {
		return nil, err
	}
	c := tls.Client(inner, p.config(cert, "http/1.1"))
	ctx, cancel := context.WithTimeout(ctx, p.times.Dial)
	defer cancel()
	if err := c.HandshakeContext(ctx); err != nil {
		inner.Close()
		return nil, fmt.Errorf("%s: %w", url, err)
	}
	return c, nil
}

// config returns the TLS configuration of a client; protocols are for ALPN.
func (p *Pool) config(cert *Certificate, protocols ...string) *tls.Config {
	c := &tls.Config{RootCAs: p.roots, ServerName: Host, MinVersion: tls.VersionTLS12, NextProtos: protocols}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert.load() }
	}
	return c
}
