package network

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
)

// Config is the part of the network's configuration that does not change while the node
// runs.
type Config struct {
	NodeName string
	DataDir  string // holds cni/bin and cni/net.d
	RunDir   string // holds the CNI socket and the leases

	// PodCIDRs are the node's ranges for its pods if they are known before the node is
	// registered, at most one for each family. Otherwise SetPodCIDRs sets them.
	PodCIDRs     []netip.Prefix
	ClusterCIDRs []netip.Prefix // of all pods of the cluster
	ServiceCIDRs []netip.Prefix
	Resolver     []netip.Addr // addresses of the cluster DNS on this node; used only to find firewalls that block it

	// MTU of pods' interfaces; 0 for the largest that fits both the default route and, less
	// Overhead, the path to other nodes.
	MTU      int
	NodeIPs  []netip.Addr // initial addresses of this node in the network between the nodes; may be empty
	Overhead int          // bytes that the backend adds to each packet between nodes

	Plugin string // target of the link cni/bin/kedge-cni; empty for the running executable
}

// DefaultConfig returns the configuration of a single IPv4 node.
func DefaultConfig() Config {
	return Config{
		DataDir:      "/var/lib/kedge",
		RunDir:       "/run/kedge",
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
	}
}

// minMTU is the minimum that IPv6 requires of every link; a smaller value is a typing
// error.
const minMTU = 1280

// maxSocketPath is the kernel's limit for the path of a unix socket.
const maxSocketPath = 107

// Validate reports all errors of the configuration.
func (c Config) Validate() error {
	var errs []error
	if c.NodeName == "" || strings.ContainsAny(c.NodeName, "/ ") {
		errs = append(errs, fmt.Errorf("node name %q is not usable in names of interfaces and rules", c.NodeName))
	}
	for _, dir := range []struct{ what, path string }{{"data directory", c.DataDir}, {"run directory", c.RunDir}} {
		if !filepath.IsAbs(dir.path) {
			errs = append(errs, fmt.Errorf("%s %q is not an absolute path", dir.what, dir.path))
		}
	}
	if n := len(c.socket()); n > maxSocketPath {
		errs = append(errs, fmt.Errorf("run directory %s is too long: the socket in it would need %d characters, and the kernel allows %d", c.RunDir, n, maxSocketPath))
	}
	if len(c.PodCIDRs) > 0 {
		errs = append(errs, checkPodCIDRs(c.PodCIDRs))
	}
	for _, list := range []struct {
		what     string
		prefixes []netip.Prefix
	}{{"cluster range", c.ClusterCIDRs}, {"service range", c.ServiceCIDRs}} {
		for _, p := range list.prefixes {
			if !p.IsValid() || p != p.Masked() {
				errs = append(errs, fmt.Errorf("%s %s is not a network", list.what, p))
			}
		}
	}
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > 65535) {
		errs = append(errs, fmt.Errorf("MTU %d is not between %d and 65535", c.MTU, minMTU))
	}
	if c.Overhead < 0 || c.Overhead > 200 {
		errs = append(errs, fmt.Errorf("overhead of %d bytes between nodes is not between 0 and 200", c.Overhead))
	}
	return errors.Join(errs...)
}

// checkPodCIDRs accepts one range, or one of each family.
func checkPodCIDRs(ranges []netip.Prefix) error {
	var errs []error
	families := map[bool]netip.Prefix{}
	for _, p := range ranges {
		if !p.IsValid() || p != p.Masked() {
			errs = append(errs, fmt.Errorf("pod range %s is not a network", p))
			continue
		}
		if p.Addr().BitLen()-p.Bits() < 3 {
			errs = append(errs, fmt.Errorf("pod range %s is too small: it must hold at least 8 addresses", p))
		}
		if other, ok := families[p.Addr().Is4()]; ok {
			errs = append(errs, fmt.Errorf("pod ranges %s and %s have the same address family", other, p))
		}
		families[p.Addr().Is4()] = p
	}
	if len(ranges) == 0 {
		errs = append(errs, errors.New("node has no pod range"))
	}
	return errors.Join(errs...)
}

func (c Config) socket() string    { return filepath.Join(c.RunDir, "cni.sock") }
func (c Config) ledgerDir() string { return filepath.Join(c.RunDir, "network", "leases") }

// BinDir is the directory in which the container runtime finds the CNI plugin.
func (c Config) BinDir() string { return filepath.Join(c.DataDir, "cni", "bin") }

// ConfDir is the directory in which the container runtime finds the CNI configuration.
func (c Config) ConfDir() string { return filepath.Join(c.DataDir, "cni", "net.d") }
