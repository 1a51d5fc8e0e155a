package datastore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"kedge/internal/linkcast"
)

// When all machines have moved at once, no address in the book is right any more. So a member without a leader
// calls for the others on its links, with a datagram that says which member it is and on which port it listens.
// Who hears it tries a hello over TLS at the address it came from, and that decides: a stranger that sends such
// datagrams makes members try connections that fail, at most one a second and four addresses a member, and
// learns from those that arrive at the peer port what anybody can learn who connects to it.
//
// The socket is open only while another member is missing. Calls are sent only while there is no leader, but
// heard also with one: two of three that have found each other must still hear the third.

const (
	// callEvery is how often a member without a leader calls.
	callEvery = 2 * time.Second
	// discoverEvery is how often it is looked whether that is necessary.
	discoverEvery = time.Second
)

// A call is callMagic, the cluster's tag, and the ID and port of the caller.
var callMagic = []byte("kedge peer 1")

const callSize = 12 + 16 + 8 + 2

// clusterTag tells clusters on one link apart. It is no secret.
func (m *mesh) clusterTag() []byte {
	ca, err := os.ReadFile(m.cfg.CAFile)
	if err != nil {
		m.log.Debug("peers' authority", "err", err)
	}
	sum := sha256.Sum256(append(ca, m.book.get().Cluster...))
	return sum[:16]
}

// discover runs as long as the mesh is open.
func (m *mesh) discover() {
	for m.ctx.Err() == nil {
		if m.anyMissing() {
			if err := m.discoverOnce(); err != nil && m.ctx.Err() == nil {
				m.log.Debug("look for members on the links", "err", err)
			}
		}
		sleep(m.ctx, discoverEvery)
	}
}

func (m *mesh) anyMissing() bool {
	now := time.Now()
	return slices.ContainsFunc(m.all(), func(w *way) bool { return w.missing(now) })
}

// discoverOnce listens, and calls, until nobody is missing any more.
func (m *mesh) discoverOnce() error {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	conn, err := linkcast.Open(ctx, m.cfg.Port)
	if err != nil {
		return err
	}
	defer conn.Close()
	tag := m.clusterTag()

	heard := make(chan struct{})
	go func() {
		defer close(heard)
		m.hear(conn, tag)
	}()
	defer func() { conn.Close(); <-heard }()

	m.log.Debug("looking for members on the links")
	for ctx.Err() == nil && m.anyMissing() {
		// Links come and go, the more so when machines move.
		links := linkcast.Links()
		linkcast.Join(conn, links)
		if m.leaderless() {
			m.call(conn, links, tag)
		}
		sleep(ctx, callEvery)
	}
	return nil
}

func (m *mesh) hear(conn net.PacketConn, tag []byte) {
	var last time.Time
	buf := make([]byte, callSize+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		u, ok := from.(*net.UDPAddr)
		if !ok || n != callSize || !bytes.HasPrefix(buf, callMagic) || !bytes.Equal(buf[12:28], tag) {
			continue
		}
		id := fmt.Sprintf("%x", binary.BigEndian.Uint64(buf[28:]))
		w := m.way(id)
		if w == nil || w.reach().alive(time.Now()) {
			continue
		}
		// Calls are rare. More of them are no reason to work more.
		if now := time.Now(); now.Sub(last) < 100*time.Millisecond {
			continue
		} else {
			last = now
		}
		source := u.AddrPort().Addr().Unmap()
		w.hint(netip.AddrPortFrom(source, binary.BigEndian.Uint16(buf[36:])))
	}
}

func (m *mesh) call(conn net.PacketConn, links []net.Interface, tag []byte) {
	id, err := parseID(m.book.self().ID)
	if err != nil {
		return
	}
	packet := slices.Concat(callMagic, tag)
	packet = binary.BigEndian.AppendUint64(packet, uint64(id))
	packet = binary.BigEndian.AppendUint16(packet, m.cfg.Port)

	ports := []uint16{m.cfg.Port}
	for _, p := range m.book.get().Others {
		for _, a := range p.Addresses {
			if !slices.Contains(ports, a.Port()) {
				ports = append(ports, a.Port())
			}
		}
	}
	for _, port := range ports {
		linkcast.Send(conn, links, packet, port)
	}
}
