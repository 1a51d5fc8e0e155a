package assembly

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"kedge/dns/resolvconf"
	"kedge/internal/kernelnet"
	"kedge/network/backend"
	"kedge/runtime"
	"kedge/settings"
)

// Host has the properties of the machine that the configurations use.
type Host struct {
	Name         string // host name in lower case
	Launcher     string // the executable that the user has started; empty if there is no launcher
	ResolvConf   string // the file with the machine's name servers
	CgroupDriver string

	// Addresses returns the machine's addresses of the given families that are in none of the ranges, best
	// first.
	Addresses func(ipv4, ipv6 bool, ranges []netip.Prefix) ([]netip.Addr, error)
	// AddressesOf returns the addresses of one interface.
	AddressesOf func(link string) ([]netip.Addr, error)
}

// ReadHost reads the properties of this machine.
func ReadHost() (Host, error) {
	name, err := os.Hostname()
	if err != nil {
		return Host{}, fmt.Errorf("read the host name: %w; set the node's name with --node-name", err)
	}
	return Host{
		Name: strings.ToLower(strings.TrimSpace(name)), Launcher: os.Getenv(settings.LauncherVariable),
		ResolvConf: resolvconf.Find(), CgroupDriver: runtime.DetectCgroupDriver(),
		Addresses: kernelnet.FindAddresses, AddressesOf: backend.AddressesOf,
	}, nil
}

// nodeName returns the name in the settings, or else the host name.
func (h Host) nodeName(v settings.Values) (string, error) {
	if name := settings.NodeName.In(v); name != "" {
		return name, nil
	}
	if err := settings.CheckNodeName(h.Name); err != nil {
		return h.Name, fmt.Errorf("the host name %q: %w; set the node's name with --node-name", h.Name, err)
	}
	return h.Name, nil
}
