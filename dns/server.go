package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	goruntime "runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/dns/message"
	"kedge/dns/stats"
)

const (
	// tcpIdle is how long a connection without a question is kept.
	tcpIdle = 10 * time.Second

	// maxConnections bounds what clients that open connections and say nothing cost.
	maxConnections = 256

	// maxWaiting bounds the queries over UDP that wait for another server: each has a
	// goroutine and a copy of its question.
	maxWaiting = 4000

	// udpBuffer is what the kernel keeps for us while we are busy, in bytes.
	udpBuffer = 1 << 20

	// maxQuery is the longest query over UDP that is read: nobody sends more.
	maxQuery = 4096
)

// sockets are all on which queries come.
type sockets struct {
	udp     []*net.UDPConn
	tcp     []net.Listener
	metrics []net.Listener

	noMetrics error // why metrics are not served at all addresses
}

// listen opens the sockets at the addresses, which are local by now. On an error none
// stays open.
func listen(ctx context.Context, addrs []netip.Addr) (s sockets, err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for _, a := range addrs {
		c := net.ListenConfig{Control: bindAnyway}
		at := netip.AddrPortFrom(a, port).String()
		conn, err := c.ListenPacket(ctx, "udp", at)
		if err != nil {
			return s, explain(err, at)
		}
		udp := conn.(*net.UDPConn)
		_ = udp.SetReadBuffer(udpBuffer) // less is enough for most
		s.udp = append(s.udp, udp)
		l, err := c.Listen(ctx, "tcp", at)
		if err != nil {
			return s, explain(err, at)
		}
		s.tcp = append(s.tcp, l)
		if l, err := c.Listen(ctx, "tcp", netip.AddrPortFrom(a, metricsPort).String()); err == nil {
			s.metrics = append(s.metrics, l)
		} else {
			s.noMetrics = err // names matter more
		}
	}
	return s, nil
}

// bindAnyway lets a socket be bound to an address that is local by a route only, which
// IPv6 does not accept otherwise.
func bindAnyway(network, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		if network == "udp6" || network == "tcp6" {
			failed = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
		}
	})
	return errors.Join(err, failed)
}

func explain(err error, at string) error {
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("another program has %s: if it listens on all addresses, bind it to those that it needs; if it is another node on this machine, give this one another --service-cidr: %w", at, err)
	}
	return fmt.Errorf("listen on %s: %w", at, err)
}

func (s sockets) close() {
	for _, c := range s.udp {
		c.Close()
	}
	for _, l := range s.tcp {
		l.Close()
	}
	for _, l := range s.metrics {
		l.Close()
	}
}

// readers is how many goroutines read one UDP socket. Queries that need no other server
// are answered by the goroutine that has read them.
func readers() int { return min(goruntime.GOMAXPROCS(0), 8) }

// serveUDP answers what comes on a socket until it is closed.
func (a *answerer) serveUDP(ctx context.Context, conn *net.UDPConn, waiting *sync.WaitGroup) {
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr()
	t := stats.UDP4
	if local.Is6() {
		t = stats.UDP6
	}
	var (
		in  [maxQuery]byte
		out = make([]byte, 0, maxQuery)
		w   = work{transport: t}
	)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(in[:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error of an answer before
		}
		w.began = time.Now()
		answer, done := a.atOnce(&w, in[:n], out)
		if done {
			if answer != nil {
				_, _ = conn.WriteToUDPAddrPort(answer, from) // a client that is gone is no error
			}
			continue
		}
		select {
		case a.waiting <- struct{}{}:
		default:
			_, _ = conn.WriteToUDPAddrPort(a.refuse(&w, out), from)
			continue
		}
		later := w // Its query is a copy: the next packet overwrites ours.
		waiting.Go(func() {
			defer func() { <-a.waiting }()
			_, _ = conn.WriteToUDPAddrPort(a.later(ctx, &later, nil), from)
		})
	}
}

// serveTCP answers connections until the listener is closed.
func (a *answerer) serveTCP(ctx context.Context, l net.Listener, waiting *sync.WaitGroup) {
	slots := make(chan struct{}, maxConnections)
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of files, most likely
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		waiting.Go(func() {
			defer func() { <-slots }()
			defer conn.Close()
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			a.converse(ctx, conn)
		})
	}
}

// converse answers the queries of one connection, one after another (RFC 7766 allows it).
func (a *answerer) converse(ctx context.Context, conn net.Conn) {
	w := &work{transport: stats.TCP4, tcp: true}
	if conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Is6() {
		w.transport = stats.TCP6
	}
	var in, out []byte
	for {
		_ = conn.SetDeadline(time.Now().Add(tcpIdle))
		var length [2]byte
		if _, err := io.ReadFull(conn, length[:]); err != nil {
			return
		}
		n := int(binary.BigEndian.Uint16(length[:]))
		if cap(in) < n {
			in = make([]byte, n)
		}
		if _, err := io.ReadFull(conn, in[:n]); err != nil {
			return
		}
		w.began = time.Now()
		answer, done := a.atOnce(w, in[:n], out)
		if !done {
			answer = a.later(ctx, w, out)
		}
		if answer == nil {
			return // it does not speak DNS
		}
		out = answer[:0]
		packet := net.Buffers{binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer}
		if _, err := packet.WriteTo(conn); err != nil {
			return
		}
	}
}

// limit is how long an answer may be.
func (w *work) limit() int {
	if w.tcp {
		return message.MaxTCP
	}
	return w.query.UDPLimit()
}

// Ports.
const (
	port        = 53
	metricsPort = 9153
)

// address is host and port as text.
func address(a netip.Addr, port int) string { return net.JoinHostPort(a.String(), strconv.Itoa(port)) }
