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

// Mode is a way in which packets travel between the pods of two nodes. The names
// are flannel's.
type Mode string

// The ways. All nodes of a cluster must have the same.
const (
	VXLAN  Mode = "vxlan"   // in UDP, by the kernel; any network that carries UDP will do
	HostGW Mode = "host-gw" // as they are; the nodes must be on one link
	UDP    Mode = "udp"     // in UDP, by kedge; slow, for kernels without VXLAN
	None   Mode = "none"    // somebody else's business

	WireGuard Mode = "wireguard" // encrypted in UDP, by the kernel, or by kedge where it cannot
)

// nativeWireGuard is what WireGuard is called by k3s.
const nativeWireGuard = "wireguard-native"

var modes = []Mode{VXLAN, HostGW, WireGuard, UDP, None}

// ParseMode reads a mode as users write it.
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

// What flannel uses, so that firewalls that let it pass let kedge pass.
const (
	defaultVNI       = 1
	defaultVXLANPort = 8472
	defaultUDPPort   = 8285

	defaultWireGuardPort = 51820
	defaultKeyLife       = 24 * time.Hour
)

// Config is what the backend of a node is told once.
type Config struct {
	NodeName string
	Mode     Mode

	// NodeIPs are the node's addresses until its Node object says which they are.
	NodeIPs []netip.Addr
	// Ranges are those of all pods of the cluster. What is sent to an address of theirs that
	// no node has is refused at once, and does not leave by the default route.
	Ranges []netip.Prefix
	// Interface is the one whose addresses other nodes should send to; empty for that
	// of the node's addresses.
	Interface string

	// External are the addresses that other nodes should send to where they are none of the
	// machine's own; empty for those of the above.
	External []netip.Addr

	VNI       int // VXLAN network identifier
	VXLANPort int // UDP port of VXLAN
	UDPPort   int // of mode UDP

	WireGuardPort int    // UDP port of WireGuard
	KeyFile       string // where this node's key for WireGuard is; it need not survive a reboot
	// KeyLife is how long a node has the same key for WireGuard. Sessions have keys of their
	// own, which WireGuard changes every two minutes: this is about the one that proves the node.
	KeyLife time.Duration
}

// DefaultConfig returns the settings that do not depend on the node.
func DefaultConfig() Config {
	return Config{Mode: VXLAN, VNI: defaultVNI, VXLANPort: defaultVXLANPort, UDPPort: defaultUDPPort, WireGuardPort: defaultWireGuardPort, KeyLife: defaultKeyLife}
}

// Validate reports everything that is wrong with c.
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

// Overhead is how many bytes of each packet between nodes are not the pods'. It is
// that of IPv4 between the nodes where the node has such an address: nodes that both
// have one use it.
func (c Config) Overhead() int {
	return c.overhead(!slices.ContainsFunc(c.NodeIPs, netip.Addr.Is4))
}

func (c Config) overhead(ipv6 bool) int {
	const (
		ipv4Header, ipv6Header, udpHeader = 20, 40, 8
		vxlanHeaders                      = 8 + 14  // its own and the pods' Ethernet
		wireGuardHeaders                  = 16 + 16 // its own and what proves the packet
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
