// Package uplink is the node's end of the tunnels: it keeps a connection to each server, through which the
// servers reach the node's kubelet and, as far as the node allows it, pods and services. So no machine needs to
// be able to connect to the node.
//
// internal/tunnel has the protocol, internal/servers the list of servers. Package assembly may import it.
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

	"kedge/internal/lastbytes"
	"kedge/internal/lifecycle"
	"kedge/internal/servers"
	"kedge/internal/tunnel"
)

// Config has the dependencies of the component.
type Config struct {
	Cert    *servers.Certificate // the node's client certificate
	Kubelet netip.AddrPort       // address of the kubelet in this process
	Ranges  []netip.Prefix       // pod and service ranges of the cluster, to which servers may connect too
	// Own returns the URL of the server in this process, which needs no tunnel to its own node. It is nil on an
	// agent.
	Own func() string
	// Self connects to what kedge itself answers to servers on this node.
	Self func() net.Conn
}

// Uplink is the component that keeps a session with each server. Its component name is "tunnel", the word in
// the users' documents.
type Uplink struct {
	cfg       Config
	pool      *servers.Pool
	list      *servers.List
	log       *slog.Logger
	reconnect lifecycle.Wakeup // requests new sessions

	mu    sync.Mutex        // guards state and the values it points to
	state map[string]*state // by URL
}

// state is the state of the connection to one server.
type state struct {
	tried bool  // a session was established, or an attempt has failed
	err   error // the reason why there is no session; nil with tried means connected
}

func (s *state) up() bool { return s != nil && s.tried && s.err == nil }

// New returns the component. It follows list, whose servers may change.
func New(cfg Config, list *servers.List, pool *servers.Pool, log *slog.Logger) *Uplink {
	return &Uplink{cfg: cfg, list: list, pool: pool, log: log, reconnect: lifecycle.NewWakeup(), state: map[string]*state{}}
}

var errNoTunnel = errors.New("no tunnel to any server: kubectl logs, exec and port-forward do not work for this node")

// Name implements lifecycle.Component.
func (u *Uplink) Name() string { return "tunnel" }

// Times of reconnecting to a server.
const (
	firstRetry = 500 * time.Millisecond
	lastRetry  = 15 * time.Second
	// After a session of this length the delay starts at firstRetry again.
	goodSession = 10 * time.Second
	// A fallback address may be a load balancer in front of several servers.
	fallbackAfter = 3 * time.Second
)

// Run implements lifecycle.Component. It calls ready at once: without a tunnel the node works, except for
// requests of the servers.
func (u *Uplink) Run(ctx context.Context, ready func()) error {
	ready()
	running := map[string]context.CancelFunc{}
	var all sync.WaitGroup
	defer all.Wait()
	start := func(url string) {
		if running[url] == nil {
			one, stop := context.WithCancel(ctx)
			running[url] = stop
			all.Go(func() { u.maintain(one, url) })
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
		// The servers' own addresses may be unreachable from here.
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
		case <-u.reconnect:
			for url := range running {
				stop(url)
			}
		case <-tick.C:
			waited = true
		}
	}
}

// Reconnect replaces all sessions by new sessions at once, because this machine's addresses have changed.
func (u *Uplink) Reconnect() {
	u.reconnect.Wake()
}

func (u *Uplink) connected(urls []string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.ContainsFunc(urls, func(url string) bool { return u.state[url].up() })
}

// maintain maintains a session with one server until ctx ends.
func (u *Uplink) maintain(ctx context.Context, url string) {
	current := &state{}
	u.mu.Lock()
	u.state[url] = current
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if u.state[url] == current { // the server may have been added to the list again
			delete(u.state, url)
		}
	}()
	wait := lifecycle.Backoff{First: firstRetry, Last: lastRetry, Spread: 1}
	for {
		begun := time.Now()
		err := u.session(ctx, url, current)
		if ctx.Err() != nil {
			return
		}
		if u.note(current, err) {
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

// note stores the result of an attempt, and reports whether the state has changed.
func (u *Uplink) note(s *state, err error) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	news := !s.tried || (s.err == nil) != (err == nil)
	s.tried, s.err = true, err
	return news
}

// session runs one session and returns the reason why it failed or ended.
func (u *Uplink) session(ctx context.Context, url string, current *state) error {
	conn, err := u.pool.DialTLS(ctx, url, u.cfg.Cert)
	if err != nil {
		return err
	}
	if conn, err = tunnel.Upgrade(ctx, conn, servers.Host); err != nil {
		return err
	}
	u.note(current, nil)
	u.log.Info("connected the tunnel to a server", "server", url)
	return tunnel.Serve(ctx, conn, u.dial, tunnel.DefaultOptions(), u.log)
}

// dial connects to the destination that a server requests, if it is allowed.
func (u *Uplink) dial(ctx context.Context, d tunnel.Destination) (net.Conn, error) {
	to := u.cfg.Kubelet
	switch d.Kind {
	case tunnel.Node:
		return u.cfg.Self(), nil
	case tunnel.Egress:
		if err := allowed(d.Addr.Addr(), u.cfg.Ranges, isOwn); err != nil {
			return nil, err
		}
		to = d.Addr
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", to.String())
	if err != nil || d.Kind == tunnel.Egress {
		return conn, err
	}
	return lastbytes.Guard(conn), nil
}

// Describe implements lifecycle.Describer: it returns the servers that are connected.
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

// Check implements lifecycle.Checker: one connected server is sufficient.
func (u *Uplink) Check(context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.cfg.Own != nil && len(u.state) == 0 {
		return nil // the only server of the cluster
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
