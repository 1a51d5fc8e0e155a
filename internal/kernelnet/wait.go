package kernelnet

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// WaitCarrier returns when an interface sends packets. The end of a veth pair that was set up
// before the other end drops packets until a worker of the kernel has seen its carrier, which
// takes long on a busy machine; dropped packets are sent again only after seconds. Since
// version 6.9, a request for one interface makes the kernel look at once; with older kernels
// the answer changes when the worker is done. It is an error when that takes over two seconds.
func WaitCarrier(h *netlink.Handle, index int) error {
	return await(fmt.Sprintf("the carrier of interface %d", index), func() (bool, error) {
		link, err := h.LinkByIndex(index)
		if err != nil {
			return false, err
		}
		state := link.Attrs().OperState
		return state != netlink.OperDown && state != netlink.OperLowerLayerDown, nil
	})
}

// WaitLocal returns when an address that was added to an interface is local. IPv6 addresses
// become so when a worker of the kernel has made their routes, also without duplicate address
// detection. It is an error when that takes over two seconds.
func WaitLocal(h *netlink.Handle, addr netip.Addr) error {
	return await(fmt.Sprintf("the route to the own address %s", addr), func() (bool, error) {
		routes, err := h.RouteGet(addr.AsSlice())
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
			return false, nil
		}
		return len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, err
	})
}

// await asks the kernel until done reports true. Mostly the first answer does, so a socket
// for notifications would cost more.
func await(what string, done func() (bool, error)) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(pause) {
		if ok, err := done(); err != nil {
			return fmt.Errorf("wait for %s: %w", what, err)
		} else if ok {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: the kernel has not finished within %v", what, limit)
		}
	}
}

const (
	limit = 2 * time.Second
	pause = 500 * time.Microsecond
)
