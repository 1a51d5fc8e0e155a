// Package uplink is the node's end of the tunnels: it keeps a connection to each
// server, over which the servers reach the node's kubelet and, as far as the node
// allows it, pods and services. Nothing needs to be able to connect to the node.
//
// The protocol is internal/tunnel's, and which servers there are says
// internal/servers. It may be imported by main.
package uplink

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/internal/servers"
	"kedge/internal/tunnel"
)

// Config is everything that the component is told.
type Config struct {
	Cert    *servers.Certificate // the node's, as a client
	Kubelet netip.AddrPort       // where this process' kubelet listens
	Ranges  []netip.Prefix       // of the cluster's pods and services: what servers may reach besides
	// Own is the URL of the server in this process, which needs no tunnel to its own
	// node. Nil on an agent.
	Own func() string
}

// Uplink is the component that keeps a session to each server. Its name is tunnel,
// which is what users know it by.
type Uplink struct {
	cfg  Config
	pool *servers.Pool
	list *servers.List
	log  *slog.Logger
	move chan struct{} // asks for new sessions; holds one request

	mu    sync.Mutex        // guards what follows, and what the pointers lead to
	state map[string]*state // by URL
}

// state is how it stands with one server.
type state struct {
	tried bool  // there is or was a session, or an attempt has failed
	err   error // why there is none; nil: there is one, if tried
}

func (s *state) up() bool { return s != nil && s.tried && s.err == nil }

// New makes the component. list is followed: servers come and go.
func New(cfg Config, list *servers.List, pool *servers.Pool, log *slog.Logger) *Uplink {
	return &Uplink{cfg: cfg, list: list, pool: pool, log: log, move: make(chan struct{}, 1), state: map[string]*state{}}
}

var errNoTunnel = errors.New("no tunnel to any server, which can neither show logs nor run commands here")

// Name implements lifecycle.Component.
func (u *Uplink) Name() string { return "tunnel" }

// Times of the way back to a server.
const (
	firstRetry = 500 * time.Millisecond
	lastRetry  = 15 * time.Second
	// A session that has lasted so long was one: the next attempt comes at once.
	goodSession = 10 * time.Second
	// Whoever a server is named by may be a balancer in front of several.
	fallbackAfter = 3 * time.Second
)

// Run implements lifecycle.Component. It is ready at once: a node works, but for
// what servers ask of it, without.
func (u *Uplink) Run(ctx context.Context, ready func()) error {
	ready()
	running := map[string]context.CancelFunc{}
	var all sync.WaitGroup
	defer all.Wait()
	start := func(url string) {
		if running[url] == nil {
			one, stop := context.WithCancel(ctx)
			running[url] = stop
			all.Go(func() { u.keep(one, url) })
		}
	}
	stop := func(url string) {
		if end := running[url]; end != nil {
			end()
			delete(running, url)
		}
	}
	defer func() {
		for url := range running {
			stop(url)
		}
	}()
	tick := time.NewTicker(fallbackAfter)
	defer tick.Stop()
	for waited := false; ; {
		known, changed := u.list.Known()
		known = slices.DeleteFunc(known, func(url string) bool { return u.cfg.Own != nil && url == u.cfg.Own() })
		for url := range running {
			if !slices.Contains(known, url) && !slices.Contains(u.list.Fallback(), url) {
				stop(url)
			}
		}
		for _, url := range known {
			start(url)
		}
		// Servers may be known by addresses that cannot be reached from here.
		for _, url := range u.list.Fallback() {
			switch {
			case slices.Contains(known, url):
			case len(known) == 0 || waited && !u.connected(known):
				start(url)
			case u.connected(known):
				stop(url)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-u.move:
			for url := range running {
				stop(url)
			}
		case <-tick.C:
			waited = true
		}
	}
}

// Moved makes new sessions in place of all that there are, at once: this machine has
// other addresses.
func (u *Uplink) Moved() {
	select {
	case u.move <- struct{}{}:
	default: // asked for already
	}
}

func (u *Uplink) connected(urls []string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.ContainsFunc(urls, func(url string) bool { return u.state[url].up() })
}

// keep keeps a session to one server until ctx ends.
func (u *Uplink) keep(ctx context.Context, url string) {
	mine := &state{}
	u.mu.Lock()
	u.state[url] = mine
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.state[url] == mine { // the server may be back on the list already
			delete(u.state, url)
		}
	}()
	wait := tunnel.Backoff{First: firstRetry, Last: lastRetry}
	for {
		begun := time.Now()
		err := u.once(ctx, url, mine)
		if ctx.Err() != nil {
			return
		}
		if u.note(mine, err) {
			u.log.Warn("no tunnel to a server", "server", url, "err", err)
		}
		if time.Since(begun) > goodSession {
			wait.Reset()
		}
		if !wait.Wait(ctx) {
			return
		}
	}
}

// note keeps how it stands with a server, and reports whether that is news.
func (u *Uplink) note(s *state, err error) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	news := !s.tried || (s.err == nil) != (err == nil)
	s.tried, s.err = true, err
	return news
}

// once is one session: it returns why there was none, or why it has ended.
func (u *Uplink) once(ctx context.Context, url string, mine *state) error {
	conn, err := u.pool.DialTLS(ctx, url, u.cfg.Cert)
	if err != nil {
		return err
	}
	if conn, err = tunnel.Upgrade(ctx, conn, servers.Host); err != nil {
		return err
	}
	u.note(mine, nil)
	u.log.Info("the tunnel is up", "server", url)
	return tunnel.Serve(ctx, conn, u.dial, tunnel.DefaultOptions(), u.log)
}

// dial connects to what a server asks for, if it is a server's business.
func (u *Uplink) dial(ctx context.Context, d tunnel.Destination) (net.Conn, error) {
	to := u.cfg.Kubelet
	if d.Kind == tunnel.Egress {
		if err := allowed(d.Addr.Addr(), u.cfg.Ranges, isOwn); err != nil {
			return nil, err
		}
		to = d.Addr
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
}

// Describe implements lifecycle.Describer: the servers that reach this node.
func (u *Uplink) Describe() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	var up []string
	for url, s := range u.state {
		if s.up() {
			up = append(up, strings.TrimPrefix(url, "https://"))
		}
	}
	slices.Sort(up)
	return strings.Join(up, " ")
}

// Check implements lifecycle.Checker: one server is enough to be reached through.
func (u *Uplink) Check(context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.cfg.Own != nil && len(u.state) == 0 {
		return nil // a server that is alone
	}
	var bad []string
	for url, s := range u.state {
		if s.up() {
			return nil
		}
		if s.err != nil {
			bad = append(bad, fmt.Sprintf("%s: %v", url, s.err))
		}
	}
	slices.Sort(bad)
	return fmt.Errorf("%w: %s", errNoTunnel, strings.Join(bad, "; "))
}
