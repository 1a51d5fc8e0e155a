package lastbytes

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Guard returns a connection like conn, which leads to a program of this machine. It stops
// sending once the program has closed its end while there are bytes to read; later writes count
// as sent. Guard returns conn itself if it leads elsewhere, or if the kernel lacks the
// information (CONFIG_INET_DIAG).
func Guard(conn net.Conn) net.Conn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return conn
	}
	// Whether the program has accepted it yet does not matter.
	if _, err := openAtPeer(tcp); err != nil {
		return conn
	}
	return &guarded{TCPConn: tcp}
}

type guarded struct{ *net.TCPConn }

// Write implements net.Conn.
func (g *guarded) Write(b []byte) (int, error) {
	// Without bytes to read a reset is harmless, and mostly there are none.
	if g.waiting() {
		open, err := openAtPeer(g.TCPConn)
		if err == nil && !open || errors.Is(err, unix.ENOENT) {
			return len(b), nil
		}
	}
	return g.TCPConn.Write(b)
}

// waiting reports whether there are unread bytes.
func (g *guarded) waiting() bool {
	raw, err := g.SyscallConn()
	if err != nil {
		return false
	}
	n := 0
	err = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) })
	return err == nil && n > 0
}

// openAtPeer asks the kernel whether a program has the other end of a connection within this
// machine open. The error is unix.ENOENT if there is no such socket, or if the kernel does not
// report sockets.
func openAtPeer(conn *net.TCPConn) (bool, error) {
	local, remote := addrPort(conn.LocalAddr()), addrPort(conn.RemoteAddr())
	diag, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return false, fmt.Errorf("open netlink: %w", err)
	}
	defer diag.Close()
	msgs, err := diag.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request},
		Data:   diagRequest(remote, local),
	})
	if err != nil {
		return false, fmt.Errorf("ask for a socket: %w", err)
	}
	// struct inet_diag_msg; the inode is its last field, and 0 for a socket without a file.
	const size = 72
	if len(msgs) == 0 || len(msgs[0].Data) < size {
		return false, errors.New("ask for a socket: the kernel's answer is too short")
	}
	return binary.NativeEndian.Uint32(msgs[0].Data[size-4:]) != 0, nil
}

// diagRequest is a struct inet_diag_req_v2 for the socket of one connection.
func diagRequest(local, remote netip.AddrPort) []byte {
	b := make([]byte, 56)
	b[0], b[1] = unix.AF_INET6, unix.IPPROTO_TCP
	if local.Addr().Is4() {
		b[0] = unix.AF_INET
	}
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // in any state
	binary.BigEndian.PutUint16(b[8:], local.Port())
	binary.BigEndian.PutUint16(b[10:], remote.Port())
	copy(b[12:28], local.Addr().AsSlice())
	copy(b[28:44], remote.Addr().AsSlice())
	for i := 48; i < 56; i++ {
		b[i] = 0xff // no cookie
	}
	return b
}

func addrPort(a net.Addr) netip.AddrPort {
	ap := a.(*net.TCPAddr).AddrPort() // of a TCP connection
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}
