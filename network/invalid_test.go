package network

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestInvalidSegments: a segment with a wrong sequence number belongs to no connection for
// the kernel, so it is not translated back. Whoever sees it refuses it, and the refusal, which
// is for the endpoint itself, ends the connection through the service.
func TestInvalidSegments(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		must := func(t *testing.T, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		s := newServices(t, nil)
		server, client := s.pod(), s.pod()
		cluster := pick(is6, webV4, webV6)
		s.apply("default/web", web(cluster, server))
		var l net.Listener
		s.must(server.ns.Do(func() (err error) {
			l, err = net.Listen("tcp", at(server.addr(is6), 8080))
			return err
		}))
		defer l.Close()
		for _, c := range []struct {
			from string
			do   func(func() error) error
		}{{"pod", client.ns.Do}, {"node", here}, {"outside", s.outside.Do}, {"the pod itself", server.ns.Do}} {
			t.Run(c.from, func(t *testing.T) {
				var there net.Conn
				must(t, c.do(func() (err error) {
					there, err = net.DialTimeout("tcp", at(cluster, 80), 2*time.Second)
					return err
				}))
				defer there.Close()
				conn, err := l.Accept()
				must(t, err)
				defer conn.Close()
				exchange := func(from, to net.Conn) {
					t.Helper()
					if _, err := from.Write([]byte("data")); err != nil {
						t.Error(err)
						return
					}
					to.SetReadDeadline(time.Now().Add(5 * time.Second))
					if _, err := io.ReadFull(to, make([]byte, 4)); err != nil {
						t.Errorf("after segments with wrong numbers: %v", err)
					}
				}
				exchange(conn, there)
				exchange(there, conn)
				seq, ack := numbers(t, conn.(*net.TCPConn))
				must(t, server.ns.Do(func() error {
					return sendSegment(addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr()), seq+1<<30, ack)
				}))
				must(t, c.do(func() error { // and from the other side
					return sendSegment(addrPort(there.LocalAddr()), addrPort(there.RemoteAddr()), ack+1<<30, seq)
				}))
				time.Sleep(50 * time.Millisecond) // a refusal would have come back by then
				exchange(conn, there)
				exchange(there, conn)
			})
		}
	})
}

func addrPort(a net.Addr) netip.AddrPort { return a.(*net.TCPAddr).AddrPort() }

// numbers returns the sequence numbers of an idle connection: of the next byte that it
// sends, and of the next that it receives.
func numbers(t *testing.T, conn *net.TCPConn) (seq, ack uint32) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const receiveQueue, sendQueue, off = 1, 2, -1
	get := func(fd, queue int) uint32 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR_QUEUE, queue); err != nil {
			t.Fatal(err)
		}
		n, err := unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
		if err != nil {
			t.Fatal(err)
		}
		return uint32(n)
	}
	err = raw.Control(func(f uintptr) {
		fd := int(f)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, 1); err != nil {
			t.Fatal(err)
		}
		seq, ack = get(fd, sendQueue), get(fd, receiveQueue)
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_REPAIR, off); err != nil {
			t.Fatal(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return seq, ack
}

// sendSegment sends one byte of a TCP connection, with numbers of the caller's choice.
func sendSegment(from, to netip.AddrPort, seq, ack uint32) error {
	b := make([]byte, 21)
	binary.BigEndian.PutUint16(b[0:], from.Port())
	binary.BigEndian.PutUint16(b[2:], to.Port())
	binary.BigEndian.PutUint32(b[4:], seq)
	binary.BigEndian.PutUint32(b[8:], ack)
	b[12], b[13] = 5<<4, 0x18 // length of the header in words; PSH and ACK
	binary.BigEndian.PutUint16(b[14:], 512)
	src, dst := from.Addr().Unmap(), to.Addr().Unmap()
	var sum uint32
	for _, part := range [][]byte{src.AsSlice(), dst.AsSlice(), {0, unix.IPPROTO_TCP, 0, byte(len(b))}, b, {0}} {
		for i := 0; i+1 < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	sum += uint32(b[len(b)-1]) << 8
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[16:], ^uint16(sum))
	var family int
	var target unix.Sockaddr
	if dst.Is4() {
		family, target = unix.AF_INET, &unix.SockaddrInet4{Addr: dst.As4()}
	} else {
		family, target = unix.AF_INET6, &unix.SockaddrInet6{Addr: dst.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendto(fd, b, 0, target)
}
