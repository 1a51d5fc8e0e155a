// Package beacon lets an agent find a server that has moved to another address on a link
// that both are on. A server that misses nodes sends beacons, which are multicast datagrams
// with the port of its API; an agent that reaches no server listens for them.
//
// A beacon proves nothing: every machine on a link can send one with any source address. An
// agent that receives a beacon tries a connection, and TLS proves that it leads to a server
// of the cluster. A stranger on the link can therefore only make agents without a server try
// connections that fail, at a bounded rate.
//
// The sockets ([Open], [Join], [Send]) know nothing of the payload. The datastore uses them
// for datagrams of its own. The package may be imported by main and datastore.
package beacon

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

	"kedge/internal/lifecycle"
)

const (
	// fastInterval is the interval of beacons for fastPeriod after nodes have gone missing,
	// and slowInterval the interval after that: a node may be off for good.
	fastInterval = 2 * time.Second
	fastPeriod   = 5 * time.Minute
	slowInterval = 30 * time.Second
	// movedPeriod is how long a server that has moved sends beacons in any case: it notices
	// later than its nodes that their sessions are dead.
	movedPeriod = 30 * time.Second
	// checkInterval is the interval at which an agent checks whether it must listen.
	checkInterval = time.Second
	// rejoinInterval is the interval at which a listening agent joins groups on new links.
	rejoinInterval = 2 * time.Second
	// acceptInterval is the least time between two beacons that an agent acts on.
	acceptInterval = 100 * time.Millisecond
)

// magic begins a beacon. The cluster's tag and the port of the server's API follow.
const (
	magic = "kedge server"
	size  = len(magic) + 16 + 2
)

// tag distinguishes clusters on a link. It is not secret.
func tag(authority []byte) []byte {
	sum := sha256.Sum256(authority)
	return sum[:16]
}

// Sender is the component of a server that sends beacons.
type Sender struct {
	packet  []byte
	port    uint16
	missing func() bool
	wake    lifecycle.Wakeup
	log     *slog.Logger
}

// NewSender makes the component. authority is the certificate (DER) of the API's authority,
// port is the API's, and missing reports whether this server misses nodes.
func NewSender(authority []byte, port uint16, missing func() bool, log *slog.Logger) *Sender {
	packet := binary.BigEndian.AppendUint16(slices.Concat([]byte(magic), tag(authority)), port)
	return &Sender{packet: packet, port: port, missing: missing, wake: lifecycle.NewWakeup(), log: log}
}

// Name implements lifecycle.Component.
func (s *Sender) Name() string { return "calls" }

// Moved must be called when this machine has moved: nodes may be missing because of it.
func (s *Sender) Moved() {
	s.wake.Wake()
}

// Run implements lifecycle.Component. It is ready at once.
func (s *Sender) Run(ctx context.Context, ready func()) error {
	ready()
	since := time.Now()
	var moved time.Time
	for missed := false; ; {
		wait := fastInterval
		missing := s.missing()
		if missing && missed || time.Since(moved) < movedPeriod { // a node may be about to connect again
			if err := s.send(ctx); err != nil && ctx.Err() == nil {
				s.log.Debug("cannot send a beacon to missing nodes", "err", err)
			}
			if time.Since(since) > fastPeriod {
				wait = slowInterval
			}
		}
		if missed = missing; !missing {
			since = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.wake:
			since, moved = time.Now(), time.Now()
		case <-time.After(wait):
		}
	}
}

func (s *Sender) send(ctx context.Context) error {
	conn, err := Open(ctx, 0)
	if err != nil {
		return err
	}
	defer conn.Close()
	Send(conn, Links(), s.packet, s.port)
	return nil
}

// Listener is the component of an agent that listens for beacons.
type Listener struct {
	tag      []byte
	lost     func() bool
	ports    func() []uint16
	found    func(server string)
	log      *slog.Logger
	accepted time.Time // of the latest beacon that the agent has acted on
}

// NewListener makes the component. lost reports whether no server is reached, ports are the
// known ports of the servers' APIs, and found is called with the URL of a server that has
// sent a beacon.
func NewListener(authority []byte, lost func() bool, ports func() []uint16, found func(server string), log *slog.Logger) *Listener {
	return &Listener{tag: tag(authority), lost: lost, ports: ports, found: found, log: log}
}

// Name implements lifecycle.Component.
func (l *Listener) Name() string { return "calls" }

// Run implements lifecycle.Component. It is ready at once.
func (l *Listener) Run(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(checkInterval)
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
	ended := make(chan struct{}, 1)
	beacons := make(chan netip.AddrPort)
	for _, port := range l.ports() {
		conn, err := Open(ctx, port)
		if err != nil {
			l.log.Debug("cannot listen for servers' beacons", "port", port, "err", err)
			continue
		}
		defer conn.Close()
		conns = append(conns, conn)
		go func() {
			defer func() { ended <- struct{}{} }()
			l.receive(ctx, conn, beacons)
		}()
	}
	defer func() {
		cancel()
		for _, conn := range conns {
			conn.Close()
			<-ended
		}
	}()
	tick := time.NewTicker(rejoinInterval)
	defer tick.Stop()
	for l.lost() {
		// Links come and go, above all when machines move.
		links := Links()
		for _, conn := range conns {
			Join(conn, links)
		}
		select {
		case <-ctx.Done():
			return
		case from := <-beacons:
			if now := time.Now(); now.Sub(l.accepted) >= acceptInterval {
				l.accepted = now
				l.found((&url.URL{Scheme: "https", Host: from.String()}).String())
			}
		case <-tick.C:
		}
	}
}

// receive passes on the senders of valid beacons until the socket is closed.
func (l *Listener) receive(ctx context.Context, conn net.PacketConn, beacons chan<- netip.AddrPort) {
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
		case beacons <- netip.AddrPortFrom(u.AddrPort().Addr().Unmap(), port):
		case <-ctx.Done():
			return
		}
	}
}

// parse returns the port in a beacon of the cluster with the tag.
func parse(packet, tag []byte) (port uint16, ok bool) {
	if len(packet) != size || !bytes.HasPrefix(packet, []byte(magic)) || !bytes.Equal(packet[len(magic):size-2], tag) {
		return 0, false
	}
	port = binary.BigEndian.Uint16(packet[size-2:])
	return port, port != 0
}
