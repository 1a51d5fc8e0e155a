package lan

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
	"kedge/internal/namespaces"
)

const (
	// Bridge is the name of the switch's interface, in the switch's namespace.
	Bridge = "switch"

	// Uplink is the name of the interface that joins a host to the switch.
	Uplink = "eth0"
)

// LAN is a switch and the hosts joined to it.
type LAN struct {
	ns *namespaces.Network
	nl *netlink.Handle

	bridge netlink.Link

	mu     sync.Mutex // guards the fields below
	hosts  map[string]*Host
	closed bool
}

// New creates a switch without hosts. Close removes it and its hosts.
func New() (*LAN, error) {
	ns, err := namespaces.NewNetwork()
	if err != nil {
		return nil, err
	}
	l := &LAN{ns: ns, hosts: map[string]*Host{}}
	if err := l.setUp(); err != nil {
		return nil, errors.Join(fmt.Errorf("create switch: %w", err), l.Close())
	}
	return l, nil
}

// Open opens a switch that another process has made, by the path of its namespace.
// [LAN.Disown] ends this process's use of the switch, and Close removes it.
func Open(path string) (*LAN, error) {
	ns, err := namespaces.OpenNetwork(path)
	if err != nil {
		return nil, fmt.Errorf("open switch: %w", err)
	}
	l := &LAN{ns: ns, hosts: map[string]*Host{}}
	if l.nl, err = routeHandle(ns); err == nil {
		l.bridge, err = l.nl.LinkByName(Bridge)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open switch: %w", err), l.Disown())
	}
	return l, nil
}

func (l *LAN) setUp() error {
	var err error
	if l.nl, err = routeHandle(l.ns); err != nil {
		return err
	}
	// The switch itself has no address, and sends nothing on its cables.
	if err := l.ns.Do(func() error { return writeSysctl("net/ipv6/conf/default/disable_ipv6", "1") }); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = Bridge
	// Without snooping, IPv6 neighbour discovery is flooded as on a plain switch. With
	// snooping, and without a querier on the link, it may be dropped.
	noSnooping := false
	l.bridge = &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &noSnooping}
	if err := l.nl.LinkAdd(l.bridge); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	return l.nl.LinkSetUp(l.bridge)
}

// Path names the switch's namespace for other processes; see namespaces.Network.Path.
func (l *LAN) Path() string { return l.ns.Path() }

// FD is the switch's namespace, open until Close or Disown.
func (l *LAN) FD() int { return l.ns.FD() }

// Netlink returns a routing socket in the switch's namespace, for operations without a method
// here.
func (l *LAN) Netlink() *netlink.Handle { return l.nl }

// Do runs fn on a thread inside the switch's namespace. Sockets that fn opens stay there.
func (l *LAN) Do(fn func() error) error { return l.ns.Do(fn) }

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
		return nil, errors.Join(fmt.Errorf("join host %s to the switch: %w", name, err), h.unplug())
	}
	l.hosts[name] = h
	return h, nil
}

// Adopt opens a host of this switch that another process has made, by the path of its
// namespace. The host's cable must be in the switch.
func (l *LAN) Adopt(name, path string) (*Host, error) {
	ns, err := namespaces.OpenNetwork(path)
	if err != nil {
		return nil, fmt.Errorf("host %s: %w", name, err)
	}
	h := &Host{Name: name, lan: l, ns: ns}
	if h.nl, err = routeHandle(ns); err == nil {
		err = h.find()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("host %s: %w", name, err), h.release())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.hosts[name] != nil {
		return nil, errors.Join(fmt.Errorf("host %s exists already", name), h.release())
	}
	l.hosts[name] = h
	return h, nil
}

// Attach joins the caller's own network namespace to the switch by an interface with the given
// name and addresses. The interface disappears with the switch; [Detach] removes it before.
func (l *LAN) Attach(name string, addrs ...netip.Prefix) error {
	here, err := namespaces.CurrentNetwork()
	if err != nil {
		return err
	}
	defer here.Close()
	l.mu.Lock()
	defer l.mu.Unlock()
	cable, err := l.freeCable()
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = cable, l.bridge.Attrs().Index
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerNamespace = name, netlink.NsFd(here.FD())
	if err := l.nl.LinkAdd(pair); err != nil {
		return fmt.Errorf("add interface %s: %w", name, err)
	}
	if err := l.nl.LinkSetUp(pair); err != nil {
		return err
	}
	// This machine receives packets of the hosts, and forwards none.
	for _, knob := range []string{"net/ipv4/conf/" + name + "/forwarding", "net/ipv6/conf/" + name + "/forwarding", "net/ipv6/conf/" + name + "/accept_ra"} {
		if err := writeSysctl(knob, "0"); err != nil {
			return err
		}
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	link, err := nl.LinkByName(name)
	if err != nil {
		return err
	}
	for _, p := range addrs {
		if err := addAddr(nl, link, p); err != nil {
			return err
		}
	}
	return nl.LinkSetUp(link)
}

// Detach removes the interface of [LAN.Attach], and does nothing when there is none.
func Detach(name string) error {
	link, err := netlink.LinkByName(name)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

// freeCable returns an unused name for the switch's end of a cable. Caller holds mu.
func (l *LAN) freeCable() (string, error) {
	links, err := kernelnet.List(l.nl.LinkList)
	if err != nil {
		return "", err
	}
	used := map[string]bool{}
	for _, link := range links {
		used[link.Attrs().Name] = true
	}
	for n := 0; ; n++ {
		if name := fmt.Sprint("p", n); !used[name] {
			return name, nil
		}
	}
}

// Close removes the hosts and the switch. Processes in a host keep its namespace alive, cut
// off from all others; end them first.
func (l *LAN) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	var errs []error
	if l.nl != nil && l.bridge != nil {
		// A process left behind in a host's namespace would keep that end of its cable.
		// Removing the switch's ends removes all cables.
		errs = append(errs, removeLinks(l.nl))
	}
	return errors.Join(append(errs, l.disown())...)
}

// Disown ends this process's use of the switch and its hosts, and leaves them to the processes
// that run in them.
func (l *LAN) Disown() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	return l.disown()
}

func (l *LAN) disown() error {
	l.closed = true
	var errs []error
	for _, h := range l.hosts {
		errs = append(errs, h.release())
	}
	clear(l.hosts)
	if l.nl != nil {
		l.nl.Close()
	}
	return errors.Join(append(errs, l.ns.Close())...)
}

func removeLinks(nl *netlink.Handle) error {
	links, err := kernelnet.List(nl.LinkList)
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

// routeHandle opens a netlink socket in a namespace. The socket stays there, whichever thread
// uses it later.
func routeHandle(ns *namespaces.Network) (*netlink.Handle, error) {
	var h *netlink.Handle
	err := ns.Do(func() error {
		var err error
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	return h, err
}

// writeSysctl sets a parameter of the calling thread's network namespace. A parameter that the
// kernel lacks, such as those of IPv6 where that is off, is ignored.
func writeSysctl(name, value string) error {
	err := os.WriteFile("/proc/sys/"+name, []byte(value), 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
