// Package calls lets an agent find a server again that has moved to another address, on
// a link that both are on: a server whose nodes are missing calls, and an agent that
// reaches no server listens.
//
// A call is believed by nobody. It makes an agent try a connection, which proves by TLS
// that it leads to a server of the cluster; what a stranger on the link can do with calls
// is to make agents without a server try connections that fail, to a handful of addresses.
// It may be imported by main.
package calls

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"kedge/internal/linkcast"
)

const (
	// first is how often a server calls while nodes have only just been missing, and
	// later how often it does after firstFor: a node may be off for good.
	first    = 2 * time.Second
	firstFor = 5 * time.Minute
	later    = 30 * time.Second
	// movedFor is how long a server that has moved calls in any case: that its nodes'
	// sessions are dead it sees later than they do.
	movedFor = 30 * time.Second
	// lookEvery is how often an agent looks whether it has to listen.
	lookEvery = time.Second
	// rejoinEvery is how often it listens on links that are new.
	rejoinEvery = 2 * time.Second
	// hearEvery bounds how often it makes something of calls.
	hearEvery = 100 * time.Millisecond
)

// magic begins a call. The cluster's tag and the port of the server's API follow.
const (
	magic = "kedge server"
	size  = len(magic) + 16 + 2
)

// tag tells clusters on one link apart. It is no secret.
func tag(authority []byte) []byte {
	sum := sha256.Sum256(authority)
	return sum[:16]
}

// Caller is the component of a server that calls.
type Caller struct {
	packet  []byte
	port    uint16
	missing func() bool
	wake    chan struct{}
	log     *slog.Logger
}

// NewCaller makes the component. authority is the certificate (DER) of the API's, port the
// API's, and missing says whether there are nodes that this server does not reach.
func NewCaller(authority []byte, port uint16, missing func() bool, log *slog.Logger) *Caller {
	packet := binary.BigEndian.AppendUint16(slices.Concat([]byte(magic), tag(authority)), port)
	return &Caller{packet: packet, port: port, missing: missing, wake: make(chan struct{}, 1), log: log}
}

// Name implements lifecycle.Component.
func (c *Caller) Name() string { return "calls" }

// Moved says that this machine has moved: nodes that are missing may be so because of it.
func (c *Caller) Moved() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run implements lifecycle.Component. It is ready at once.
func (c *Caller) Run(ctx context.Context, ready func()) error {
	ready()
	since := time.Now()
	var moved time.Time
	for missed := false; ; {
		wait := first
		missing := c.missing()
		if missing && missed || time.Since(moved) < movedFor { // for a moment nodes may be on their way
			if err := c.call(ctx); err != nil && ctx.Err() == nil {
				c.log.Debug("nodes that are missing were not called", "err", err)
			}
			if time.Since(since) > firstFor {
				wait = later
			}
		}
		if missed = missing; !missing {
			since = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
			since, moved = time.Now(), time.Now()
		case <-time.After(wait):
		}
	}
}

func (c *Caller) call(ctx context.Context) error {
	conn, err := linkcast.Open(ctx, 0)
	if err != nil {
		return err
	}
	defer conn.Close()
	linkcast.Send(conn, linkcast.Links(), c.packet, c.port)
	return nil
}

// Listener is the component of an agent that listens.
type Listener struct {
	tag    []byte
	lost   func() bool
	ports  func() []uint16
	tell   func(server string)
	log    *slog.Logger
	latest time.Time // a call was made something of
}

// NewListener makes the component. lost says whether no server is reached, ports are those
// of the servers' APIs as far as they are known, and tell is told the URL of a server that
// has called.
func NewListener(authority []byte, lost func() bool, ports func() []uint16, tell func(server string), log *slog.Logger) *Listener {
	return &Listener{tag: tag(authority), lost: lost, ports: ports, tell: tell, log: log}
}

// Name implements lifecycle.Component.
func (l *Listener) Name() string { return "calls" }

// Run implements lifecycle.Component. It is ready at once.
func (l *Listener) Run(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		if l.lost() {
			l.listen(ctx)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// listen returns when a server is reached.
func (l *Listener) listen(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var conns []net.PacketConn
	heard := make(chan struct{}, 1)
	calls := make(chan netip.AddrPort)
	for _, port := range l.ports() {
		conn, err := linkcast.Open(ctx, port)
		if err != nil {
			l.log.Debug("servers that call cannot be heard", "port", port, "err", err)
			continue
		}
		defer conn.Close()
		conns = append(conns, conn)
		go func() {
			defer func() { heard <- struct{}{} }()
			l.hear(ctx, conn, calls)
		}()
	}
	defer func() {
		cancel()
		for _, conn := range conns {
			conn.Close()
			<-heard
		}
	}()
	tick := time.NewTicker(rejoinEvery)
	defer tick.Stop()
	for l.lost() {
		// Links come and go, the more so when machines move.
		links := linkcast.Links()
		for _, conn := range conns {
			linkcast.Join(conn, links)
		}
		select {
		case <-ctx.Done():
			return
		case from := <-calls:
			if now := time.Now(); now.Sub(l.latest) >= hearEvery {
				l.latest = now
				l.tell((&url.URL{Scheme: "https", Host: from.String()}).String())
			}
		case <-tick.C:
		}
	}
}

// hear passes on where calls came from until the socket is closed.
func (l *Listener) hear(ctx context.Context, conn net.PacketConn, calls chan<- netip.AddrPort) {
	buf := make([]byte, size+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		u, ok := from.(*net.UDPAddr)
		port, valid := parse(buf[:n], l.tag)
		if !ok || !valid {
			continue
		}
		select {
		case calls <- netip.AddrPortFrom(u.AddrPort().Addr().Unmap(), port):
		case <-ctx.Done():
			return
		}
	}
}

// parse reads the port of a call to the cluster with the tag.
func parse(packet, tag []byte) (port uint16, ok bool) {
	if len(packet) != size || !bytes.HasPrefix(packet, []byte(magic)) || !bytes.Equal(packet[len(magic):size-2], tag) {
		return 0, false
	}
	port = binary.BigEndian.Uint16(packet[size-2:])
	return port, port != 0
}
