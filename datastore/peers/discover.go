package peers

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

	"kedge/internal/beacon"
)

// Discovery finds the members after all machines have moved at once, when every address in the address book is wrong. A
// member without a leader announces itself on its links, with a datagram that holds its ID and its port. Each member that
// receives the datagram sends a heartbeat over TLS to its source address, and only the answer to that counts. A forged
// datagram makes members open connections that fail, at most ten a second and to four addresses for each member; its
// sender learns from them no more than by connecting to the peer port itself.
//
// The socket is open only while another member is unreachable. A member with a leader receives announcements too, though
// it sends none: two of three members that have found each other must still receive those of the third.

const (
	// announceInterval is the interval of announcements while there is no leader.
	announceInterval = 2 * time.Second
	// discoverInterval is the interval at which the mesh checks whether discovery is needed.
	discoverInterval = time.Second
)

// An announcement is announcementMagic, the cluster's tag, and the sender's ID and port.
var announcementMagic = []byte("kedge peer 1")

const announcementSize = 12 + 16 + 8 + 2

// clusterTag tells the announcements of clusters on one link apart. It is not a secret.
func (m *Mesh) clusterTag() []byte {
	ca, err := os.ReadFile(m.cfg.CAFile)
	if err != nil {
		m.log.Debug("cannot read the peer CA certificate", "err", err)
	}
	sum := sha256.Sum256(append(ca, m.book.Get().Cluster...))
	return sum[:16]
}

// discover runs discovery whenever a member is unreachable, until the mesh closes.
func (m *Mesh) discover() {
	for m.ctx.Err() == nil {
		if m.anyUnreachable() {
			if err := m.discoverUnreachable(); err != nil && m.ctx.Err() == nil {
				m.log.Debug("cannot search for members of the datastore on the links", "err", err)
			}
		}
		sleep(m.ctx, discoverInterval)
	}
}

func (m *Mesh) anyUnreachable() bool {
	now := time.Now()
	return slices.ContainsFunc(m.allLinks(), func(l *peerLink) bool { return l.unreachable(now) })
}

// discoverUnreachable receives announcements, and sends them while there is no leader, until all members are reachable.
func (m *Mesh) discoverUnreachable() error {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	conn, err := beacon.Open(ctx, m.cfg.Port)
	if err != nil {
		return err
	}
	defer conn.Close()
	tag := m.clusterTag()

	received := make(chan struct{})
	go func() {
		defer close(received)
		m.receiveAnnouncements(conn, tag)
	}()
	defer func() { conn.Close(); <-received }()

	m.log.Debug("searching for members of the datastore on the links")
	for ctx.Err() == nil && m.anyUnreachable() {
		// The list of links is read each time, because links come and go, above all when machines move.
		links := beacon.Links()
		beacon.Join(conn, links)
		if m.leaderless() {
			m.announce(conn, links, tag)
		}
		sleep(ctx, announceInterval)
	}
	return nil
}

func (m *Mesh) receiveAnnouncements(conn net.PacketConn, tag []byte) {
	var last time.Time
	buf := make([]byte, announcementSize+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		u, ok := from.(*net.UDPAddr)
		if !ok || n != announcementSize || !bytes.HasPrefix(buf, announcementMagic) || !bytes.Equal(buf[12:28], tag) {
			continue
		}
		id := fmt.Sprintf("%x", binary.BigEndian.Uint64(buf[28:]))
		l := m.link(id)
		if l == nil || l.currentStatus().Alive(time.Now()) {
			continue
		}
		// Announcements are rare. The limit keeps a flood of forged ones from causing a flood of probes.
		if now := time.Now(); now.Sub(last) < 100*time.Millisecond {
			continue
		} else {
			last = now
		}
		source := u.AddrPort().Addr().Unmap()
		l.addHint(netip.AddrPortFrom(source, binary.BigEndian.Uint16(buf[36:])))
	}
}

func (m *Mesh) announce(conn net.PacketConn, links []net.Interface, tag []byte) {
	id, err := parseID(m.book.Self().ID)
	if err != nil {
		return
	}
	packet := slices.Concat(announcementMagic, tag)
	packet = binary.BigEndian.AppendUint64(packet, uint64(id))
	packet = binary.BigEndian.AppendUint16(packet, m.cfg.Port)

	ports := []uint16{m.cfg.Port}
	for _, p := range m.book.Get().Others {
		for _, a := range p.Addresses {
			if !slices.Contains(ports, a.Port()) {
				ports = append(ports, a.Port())
			}
		}
	}
	for _, port := range ports {
		beacon.Send(conn, links, packet, port)
	}
}
