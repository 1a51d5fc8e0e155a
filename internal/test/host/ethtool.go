package host

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// ethtoolValue is struct ethtool_value of the kernel.
type ethtoolValue struct{ cmd, data uint32 }

// ethtoolRequest is struct ifreq with a pointer in its union.
type ethtoolRequest struct {
	name [unix.IFNAMSIZ]byte
	data *ethtoolValue
	_    [16]byte // the union is larger than a pointer
}

// ethtool gets or sets one feature of an interface, by any socket of its namespace.
func ethtool(fd int, link string, cmd, data uint32) (uint32, error) {
	v := ethtoolValue{cmd, data}
	req := ethtoolRequest{data: &v}
	copy(req.name[:unix.IFNAMSIZ-1], link)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return 0, errno
	}
	return v.data, nil
}
