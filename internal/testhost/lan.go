package testhost

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/netns"
)

const (
	bridgeName = "switch"

	// Uplink is the name of the interface that joins a host to the switch.
	Uplink = "eth0"
)

// LAN is a switch and the hosts joined to it.
type LAN struct {
	ns *netns.NS
	nl *netlink.Handle

	bridge netlink.Link

	mu     sync.Mutex // guards what follows
	hosts  map[string]*Host
	joined int // hosts ever joined: numbers their cables
	closed bool
}

// RequireRoot skips the test unless it may create network namespaces.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: creates network namespaces")
	}
	ns, err := netns.New()
	if err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	ns.Close()
}

// NewLAN creates a switch without hosts. Close removes it and its hosts.
func NewLAN() (*LAN, error) {
	ns, err := netns.New()
	if err != nil {
		return nil, err
	}
	l := &LAN{ns: ns, hosts: map[string]*Host{}}
	if err := l.setUp(); err != nil {
		return nil, errors.Join(fmt.Errorf("create switch: %w", err), l.Close())
	}
	return l, nil
}

func (l *LAN) setUp() error {
	var err error
	if l.nl, err = routeHandle(l.ns); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	// Without snooping, IPv6 neighbour discovery is flooded like on a plain
	// switch; with it, and with no querier on the link, it may be dropped.
	noSnooping := false
	l.bridge = &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &noSnooping}
	if err := l.nl.LinkAdd(l.bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	return l.nl.LinkSetUp(l.bridge)
}

// Host adds a host with the given addresses on its uplink, and its loopback
// interface up. Names are unique on a LAN.
func (l *LAN) Host(name string, addrs ...netip.Prefix) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, net.ErrClosed
	}
	if l.hosts[name] != nil {
		return nil, fmt.Errorf("host %s exists already", name)
	}
	h, err := newHost(l, name)
	if err != nil {
		return nil, fmt.Errorf("create host %s: %w", name, err)
	}
	if err := h.join(addrs); err != nil {
		return nil, errors.Join(fmt.Errorf("join host %s to the switch: %w", name, err), h.release())
	}
	l.hosts[name] = h
	l.joined++
	return h, nil
}

// Close removes the hosts and the switch. Processes started in the hosts keep
// their namespace alive, cut off from all others; end them first.
func (l *LAN) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	var errs []error
	for _, h := range l.hosts {
		errs = append(errs, h.release())
	}
	clear(l.hosts)
	if l.nl != nil {
		// A process left behind in a host's namespace would keep that end of
		// its cable; taking away the switch takes away all cables at once.
		if l.bridge != nil {
			errs = append(errs, removeLinks(l.nl))
		}
		l.nl.Close()
	}
	errs = append(errs, l.ns.Close())
	return errors.Join(errs...)
}

func removeLinks(nl *netlink.Handle) error {
	links, err := nl.LinkList()
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range links {
		if t := link.Type(); t != "veth" && t != "bridge" {
			continue
		}
		err := nl.LinkDel(link)
		if err != nil && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("remove %s: %w", link.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}

// routeHandle opens a netlink socket inside a namespace. The socket stays in
// it whichever thread uses it later.
func routeHandle(ns *netns.NS) (*netlink.Handle, error) {
	var h *netlink.Handle
	err := ns.Do(func() error {
		var err error
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	return h, err
}

// cableName names the switch's end of a host's cable within 15 characters.
func cableName(n int, host string) string {
	name := fmt.Sprintf("p%d-%s", n, strings.ReplaceAll(host, ".", "-"))
	return name[:min(len(name), unix.IFNAMSIZ-1)]
}
