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
	// tcpIdle is the idle timeout of a connection.
	tcpIdle = 10 * time.Second

	// maxConnections limits the cost of clients that open connections and send nothing.
	maxConnections = 256

	// maxWaiting limits the number of UDP queries that wait for an upstream server: each
	// has a goroutine and a copy of its question.
	maxWaiting = 4000

	// udpBuffer is the size of the receive buffer, in bytes.
	udpBuffer = 1 << 20

	// maxQuery is the maximum length of a UDP query; clients send no longer ones.
	maxQuery = 4096
)

// sockets are the sockets of the resolver.
type sockets struct {
	udp     []*net.UDPConn
	tcp     []net.Listener
	metrics []net.Listener

	noMetrics error // why metrics are not served at some address
}

// listen opens the sockets at the addresses, which must be local. After an error none stays
// open.
func listen(ctx context.Context, addrs []netip.Addr) (s sockets, err error) {
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	for _, a := range addrs {
		c := net.ListenConfig{Control: setFreebind}
		at := netip.AddrPortFrom(a, port).String()
		conn, err := c.ListenPacket(ctx, "udp", at)
		if err != nil {
			return s, listenError(err, at)
		}
		udp := conn.(*net.UDPConn)
		_ = udp.SetReadBuffer(udpBuffer) // less is enough for most
		s.udp = append(s.udp, udp)
		l, err := c.Listen(ctx, "tcp", at)
		if err != nil {
			return s, listenError(err, at)
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

// setFreebind allows binding a socket to an address that is local only by a route, which
// IPv6 otherwise rejects.
func setFreebind(network, _ string, c syscall.RawConn) error {
	var failed error
	err := c.Control(func(fd uintptr) {
		if network == "udp6" || network == "tcp6" {
			failed = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
		}
	})
	return errors.Join(err, failed)
}

func listenError(err error, at string) error {
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("another program listens on %s: if it listens on all addresses, bind it to the addresses that it needs; if it is another node on this machine, use another --service-cidr for this node: %w", at, err)
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

// readers is the number of goroutines that read one UDP socket. Queries that need no
// upstream server are answered by the goroutine that has read them.
func readers() int { return min(goruntime.GOMAXPROCS(0), 8) }

// serveUDP answers the queries of a socket until it is closed.
func (a *answerer) serveUDP(ctx context.Context, conn *net.UDPConn, waiting *sync.WaitGroup) {
	local := conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr()
	t := stats.UDP4
	if local.Is6() {
		t = stats.UDP6
	}
	var (
		in  [maxQuery]byte
		out = make([]byte, 0, maxQuery)
		w   = request{transport: t}
	)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(in[:])
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about an earlier answer
		}
		w.began = time.Now()
		answer, done := a.answerLocally(&w, in[:n], out)
		if done {
			if answer != nil {
				_, _ = conn.WriteToUDPAddrPort(answer, from) // the client may be gone
			}
			continue
		}
		select {
		case a.waiting <- struct{}{}:
		default:
			_, _ = conn.WriteToUDPAddrPort(a.refuse(&w, out), from)
			continue
		}
		later := w // a copy: the next packet overwrites w
		waiting.Go(func() {
			defer func() { <-a.waiting }()
			_, _ = conn.WriteToUDPAddrPort(a.answerRemotely(ctx, &later, nil), from)
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
		if err != nil { // probably out of file descriptors
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
			a.serveConn(ctx, conn)
		})
	}
}

// serveConn answers the queries of one connection, one after another (RFC 7766 allows it).
func (a *answerer) serveConn(ctx context.Context, conn net.Conn) {
	w := &request{transport: stats.TCP4, tcp: true}
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
		answer, done := a.answerLocally(w, in[:n], out)
		if !done {
			answer = a.answerRemotely(ctx, w, out)
		}
		if answer == nil {
			return // not DNS
		}
		out = answer[:0]
		packet := net.Buffers{binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer}
		if _, err := packet.WriteTo(conn); err != nil {
			return
		}
	}
}

// limit is the maximum length of the answer.
func (w *request) limit() int {
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

// address returns host and port as text.
func address(a netip.Addr, port int) string { return net.JoinHostPort(a.String(), strconv.Itoa(port)) }
