package peers

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
)

// Config says how the members of the store reach each other. A store needs it before it can have a second member. A store
// that stays alone needs none, and listens nowhere.
type Config struct {
	// Port is the port on which this member listens for the others, on all addresses: TCP always, UDP while another
	// member is unreachable. Zero means that the store stays alone.
	Port uint16

	// CAFile is the certificate of the peer CA. CertFile and KeyFile are the certificate and key of this member. All are
	// PEM, and must exist when the store starts, even if it is alone. The certificate must be valid for ServerName, as a
	// server and as a client certificate; its holder is trusted with everything in the store. CertFile and KeyFile are
	// read again for each connection, so they may be replaced while the store runs.
	CAFile, CertFile, KeyFile string

	// Addresses are the addresses of this machine at the start, best first; see Mesh.SetAddresses.
	Addresses []netip.Addr
}

// ServerName is the DNS name in the certificate of every member. It is not resolved: members authenticate each other by
// the CA, and find each other by the address book.
const ServerName = "peer.kedge.internal"

// Enabled reports whether the store may ever have more than one member.
func (c Config) Enabled() bool { return c.Port != 0 }

// Validate reports all mistakes in c at once.
func (c Config) Validate() error {
	if !c.Enabled() {
		return nil
	}
	var problems []error
	for _, file := range []struct{ name, path string }{
		{"CA certificate", c.CAFile}, {"certificate", c.CertFile}, {"key", c.KeyFile},
	} {
		if !filepath.IsAbs(file.path) {
			problems = append(problems, fmt.Errorf("path of the peer %s %q is not absolute", file.name, file.path))
		}
	}
	if c.Port == loopbackPort {
		problems = append(problems, fmt.Errorf("peer port %d is reserved for the loopback addresses of the datastore's members, choose another", c.Port))
	}
	for _, a := range c.Addresses {
		if !a.IsValid() || a.IsUnspecified() {
			problems = append(problems, fmt.Errorf("invalid peer address %v", a))
		}
	}
	return errors.Join(problems...)
}

// addrPorts returns the addresses with the peer port, without duplicates.
func (c Config) addrPorts(addrs []netip.Addr) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range addrs {
		if ap := netip.AddrPortFrom(a.Unmap(), c.Port); !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	return out
}

// Peer is the entry of one member in the address book.
type Peer struct {
	ID        string           `json:"id"` // hexadecimal; a member that is removed and admitted again gets a new one
	Name      string           `json:"name"`
	URL       string           `json:"url"`           // peer URL with the loopback address; never changes
	Addresses []netip.AddrPort `json:"addresses"`     // current addresses, best first
	Seq       uint64           `json:"seq,omitempty"` // increased by the member itself with each change of Addresses
	// Witness says that the member votes and keeps the data, and has no API server.
	Witness bool `json:"witness,omitempty"`
}

// loopbackPort is the port of the members' loopback addresses.
const loopbackPort = 2378
