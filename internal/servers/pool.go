package servers

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Host is the name by which all servers are called in URLs and in TLS, whichever it
// is: each server's certificate has it, and nobody else's is of their authority.
const Host = "kubernetes.default.svc"

// ErrNoServer is wrapped when there is no server to connect to.
var ErrNoServer = errors.New("no server of the cluster answers")

// Times are how a pool finds out which servers work.
type Times struct {
	Probe  time.Duration // between two questions to the server in use
	Others time.Duration // and to the others, while that one works
	Answer time.Duration // an answer that takes longer is none
	Dial   time.Duration // likewise a connection
}

// DefaultTimes find a server that is silent within Probe and two times Answer.
func DefaultTimes() Times {
	return Times{Probe: time.Second, Others: 5 * time.Second, Answer: time.Second, Dial: 3 * time.Second}
}

// Pool connects to a server that works. It is the component that finds out which do.
type Pool struct {
	list  *List
	roots *x509.CertPool
	times Times
	log   *slog.Logger

	mu      sync.Mutex // guards what follows
	servers map[string]*server
	current string // the URL of the one in use; empty at first

	open opened
}

// opened are the connections that are open. It has a lock of its own: connections are
// closed by whoever holds the pool's, too.
type opened struct {
	mu    sync.Mutex // guards what follows
	conns map[*tracked]struct{}
}

// server is what is known of one.
type server struct {
	url     string
	client  *http.Client // for probes
	probed  time.Time
	probing bool
	tried   bool  // it was asked, and err is what came of it
	err     error // why it does not work; nil: it does, or nobody has asked
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
		return nil, fmt.Errorf("read the authority of the servers: there is no certificate in %s", caFile)
	}
	return p, nil
}

// get returns what is known of a server. Caller holds mu.
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

// Run implements lifecycle.Component. It is ready at once: a server need not be up
// for the node to start.
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

// due are the servers that are to be asked. One that is alone is asked as seldom as
// the others: there is nowhere to go from it.
func (p *Pool) due() []*server {
	all := p.list.All()
	p.mu.Lock()
	defer p.mu.Unlock()
	for url, s := range p.servers {
		if slices.Contains(all, url) || s.probing {
			continue
		}
		s.err = errLeft // it is asked no more
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

var errLeft = errors.New("it is no server of the cluster any more")

// probe asks a server whether it is ready, and once more before its silence counts:
// one packet can be lost.
func (p *Pool) probe(ctx context.Context, s *server) {
	err := p.ask(ctx, s)
	if err != nil && ctx.Err() == nil && !definite(err) {
		err = p.ask(ctx, s)
	}
	if ctx.Err() == nil {
		p.learn(s, err)
	}
	p.mu.Lock()
	s.probing, s.probed = false, time.Now()
	p.mu.Unlock()
}

// notReady is a server's own word that it is not.
type notReady struct{ status string }

func (e notReady) Error() string { return "/readyz answers " + e.status }

// definite tells an answer, if only the machine's, from none.
func definite(err error) bool {
	return errors.As(err, &notReady{}) || errors.Is(err, syscall.ECONNREFUSED)
}

func (p *Pool) ask(ctx context.Context, s *server) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+Host+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		s.client.CloseIdleConnections()
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return notReady{resp.Status}
	}
	return nil
}

// learn notes how a probe went. Connections to servers that do not work are closed
// when there is one that does, or watches would stay where nothing comes any more.
func (p *Pool) learn(s *server, err error) {
	p.mu.Lock()
	if !s.tried || (err == nil) != (s.err == nil) {
		p.log.Debug("a server was asked", "server", s.url, "err", err)
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

// use goes on with another server. Caller holds mu.
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
		return ErrNoServer // not one has said yet that it is ready
	case cur.err != nil:
		return fmt.Errorf("%w; %s: %w", ErrNoServer, cur.url, cur.err)
	}
	return nil
}

// Current is the URL of the server in use, and empty before one was found.
func (p *Pool) Current() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current
}

// order is the servers in the order in which they are to be tried.
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
	// The list is sorted, and without this all agents would begin with one server.
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
	as   time.Time // what the certificate's file was of when the connection was made
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.pool.mu.Lock()
	delete(c.to.conns, c)
	c.pool.mu.Unlock()
	return c.Conn.Close()
}

// failures are why no server of several took a connection, in one line.
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

// dial connects to the first server that takes a connection.
func (p *Pool) dial(ctx context.Context, cert *Certificate) (net.Conn, error) {
	as := cert.changed()
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
			s.tried, s.err = true, err // a probe may find otherwise
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

// tracked is a connection that is closed when this machine loses the address that it was
// made from.
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

// Moved closes the connections from addresses that this machine does not have any more,
// and asks all servers anew. Nothing would come over these connections, and nobody would
// say so.
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

// DialTLS connects to the server at a URL and no other. cert is who this machine is;
// nil: nobody. What is spoken is HTTP/1.1.
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

// config is for clients; protocols are for ALPN.
func (p *Pool) config(cert *Certificate, protocols ...string) *tls.Config {
	c := &tls.Config{RootCAs: p.roots, ServerName: Host, MinVersion: tls.VersionTLS12, NextProtos: protocols}
	if cert != nil {
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert.load() }
	}
	return c
}
