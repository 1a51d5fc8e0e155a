package backend

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Mode is the backend: the way in which packets travel between the pods of two nodes. The
// names are flannel's.
type Mode string

// The backends. All nodes of a cluster must use the same.
const (
	VXLAN  Mode = "vxlan"   // in UDP, by the kernel; works on any network that carries UDP
	HostGW Mode = "host-gw" // without encapsulation; the nodes must be on one link
	UDP    Mode = "udp"     // in UDP, by kedge; slow, for kernels without VXLAN
	None   Mode = "none"    // by another network plugin

	WireGuard Mode = "wireguard" // encrypted in UDP, by the kernel, or by kedge where it cannot
)

// nativeWireGuard is k3s's name for WireGuard.
const nativeWireGuard = "wireguard-native"

var modes = []Mode{VXLAN, HostGW, WireGuard, UDP, None}

// ParseMode parses the name of a backend.
func ParseMode(s string) (Mode, error) {
	if s == nativeWireGuard {
		return WireGuard, nil
	}
	if m := Mode(s); slices.Contains(modes, m) {
		return m, nil
	}
	var names []string
	for _, m := range modes {
		names = append(names, string(m))
	}
	return "", fmt.Errorf("%q is not one of %s", s, strings.Join(names, ", "))
}

// The defaults are flannel's, so that firewalls that allow flannel allow kedge.
const (
	defaultVNI       = 1
	defaultVXLANPort = 8472
	defaultUDPPort   = 8285

	defaultWireGuardPort = 51820
	defaultKeyLife       = 24 * time.Hour
)

// Config is the configuration of the backend of a node.
type Config struct {
	NodeName string
	Mode     Mode

	// NodeIPs are the node's addresses until its Node object has them.
	NodeIPs []netip.Addr
	// Ranges are the ranges of all pods of the cluster. Packets to addresses without a node
	// are refused at once, and do not leave through the default route.
	Ranges []netip.Prefix
	// Interface is the interface whose addresses other nodes should use; empty for the
	// interface with the node's addresses.
	Interface string

	// External are the addresses that other nodes should use if the machine itself does not
	// have them; empty otherwise.
	External []netip.Addr

	VNI       int // VXLAN network identifier
	VXLANPort int // UDP port of VXLAN
	UDPPort   int // of mode UDP

	WireGuardPort int    // UDP port of WireGuard
	KeyFile       string // file of this node's WireGuard key; it need not survive a reboot
	// KeyLife is the lifetime of a node's WireGuard key. Sessions have keys of their own,
	// which WireGuard changes every two minutes: this is the key that authenticates the
	// node.
	KeyLife time.Duration
}

// DefaultConfig returns the settings that do not depend on the node.
func DefaultConfig() Config {
	return Config{Mode: VXLAN, VNI: defaultVNI, VXLANPort: defaultVXLANPort, UDPPort: defaultUDPPort, WireGuardPort: defaultWireGuardPort, KeyLife: defaultKeyLife}
}

// Validate reports all errors of the configuration.
func (c Config) Validate() error {
	var errs []error
	if c.NodeName == "" {
		errs = append(errs, errors.New("the backend of the pod network needs the node's name"))
	}
	if _, err := ParseMode(string(c.Mode)); err != nil {
		errs = append(errs, fmt.Errorf("backend of the pod network: %w", err))
	}
	if c.VNI < 1 || c.VNI >= 1<<24 {
		errs = append(errs, fmt.Errorf("VXLAN network identifier %d is not between 1 and 16777215", c.VNI))
	}
	for _, port := range []int{c.VXLANPort, c.UDPPort, c.WireGuardPort} {
		if port < 1 || port > 65535 {
			errs = append(errs, fmt.Errorf("UDP port %d of the pod network is not between 1 and 65535", port))
		}
	}
	if c.Mode == WireGuard && !filepath.IsAbs(c.KeyFile) {
		errs = append(errs, fmt.Errorf("file of the key for WireGuard %q is not an absolute path", c.KeyFile))
	}
	return errors.Join(errs...)
}

// Overhead is the number of bytes that the backend adds to each packet between nodes. It is
// the overhead over IPv4 if the node has an IPv4 address: nodes that both have one use it.
func (c Config) Overhead() int {
	return c.overhead(!slices.ContainsFunc(c.NodeIPs, netip.Addr.Is4))
}

func (c Config) overhead(ipv6 bool) int {
	const (
		ipv4Header, ipv6Header, udpHeader = 20, 40, 8
		vxlanHeaders                      = 8 + 14  // VXLAN and the inner Ethernet header
		wireGuardHeaders                  = 16 + 16 // WireGuard and the authentication tag
	)
	outer := ipv4Header
	if ipv6 {
		outer = ipv6Header
	}
	switch c.Mode {
	case VXLAN:
		return outer + udpHeader + vxlanHeaders
	case UDP:
		return outer + udpHeader
	case WireGuard:
		return outer + udpHeader + wireGuardHeaders
	}
	return 0
}
