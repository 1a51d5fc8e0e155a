// Package linkwait waits for what the kernel does with a network interface in its own time,
// after it was told: until then packets are lost, and sent again after seconds.
//
// It is for whoever makes interfaces that are used at once: pods' (network/cni) and those
// of hosts on a switch (internal/lan). It configures nothing. Anything in the house may
// import it; it imports nothing of the house.
package linkwait

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Carrier returns when an interface sends. The end of a pair that was set up before
// the other one throws away what it is to send until a worker of the kernel has seen its
// carrier, which takes long on a busy machine. To be asked about one interface makes the
// kernel do that at once since version 6.9; with older ones, the answer changes when it
// is done. The error is that it was not within two seconds.
func Carrier(h *netlink.Handle, index int) error {
	return await(fmt.Sprintf("the carrier of interface %d", index), func() (bool, error) {
		link, err := h.LinkByIndex(index)
		if err != nil {
			return false, err
		}
		state := link.Attrs().OperState
		return state != netlink.OperDown && state != netlink.OperLowerLayerDown, nil
	})
}

// Local returns when an address that an interface was given is local: IPv6 addresses
// are when a worker of the kernel has made their routes, also without duplicate
// detection. The error is that it was not within two seconds.
func Local(h *netlink.Handle, addr netip.Addr) error {
	return await(fmt.Sprintf("the route to the own address %s", addr), func() (bool, error) {
		routes, err := h.RouteGet(addr.AsSlice())
		if errors.Is(err, unix.ENETUNREACH) || errors.Is(err, unix.EHOSTUNREACH) {
			return false, nil
		}
		return len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL, err
	})
}

// await asks the kernel until it has done what it was told. Mostly it has when it is asked
// first, so that a socket that listens for its news would cost more.
func await(what string, done func() (bool, error)) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(pause) {
		if ok, err := done(); err != nil {
			return fmt.Errorf("wait for %s: %w", what, err)
		} else if ok {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("wait for %s: the kernel has not done it within %v", what, limit)
		}
	}
}

const (
	limit = 2 * time.Second
	pause = 500 * time.Microsecond
)
