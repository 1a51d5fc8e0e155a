package datastore

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"time"
)

// PeerConfig says how the members of the store reach each other. All of it is needed before a store can have
// more than one member; a store that is and stays alone does without, and listens nowhere.
type PeerConfig struct {
	// Port is where this member listens for the others, on all addresses: TCP always, UDP as long as one of
	// the members cannot be found. Zero means that this store stays alone.
	Port uint16

	// CAFile has the certificate of the peers' authority, CertFile and KeyFile this member's certificate and
	// key, all PEM, and all there when the store starts, also alone. The certificate must be good for
	// PeerServerName, as a server's and as a client's. Its holder is trusted with everything in the store. The
	// last two are read again for each connection, so they may be replaced while the store runs.
	CAFile, CertFile, KeyFile string

	// Addresses are this machine's own, best first, as known at the start; see Store.SetAddresses.
	Addresses []netip.Addr
}

// PeerServerName is the name in every peer's certificate. It is not an address: the members know each other by
// the authority, and find each other by other means.
const PeerServerName = "peer.kedge.internal"

// enabled reports whether the store may ever have more than one member.
func (p PeerConfig) enabled() bool { return p.Port != 0 }

func (p PeerConfig) validate() error {
	if !p.enabled() {
		return nil
	}
	var problems []error
	for _, file := range []struct{ what, path string }{
		{"authority", p.CAFile}, {"certificate", p.CertFile}, {"key", p.KeyFile},
	} {
		if !filepath.IsAbs(file.path) {
			problems = append(problems, fmt.Errorf("file of the peers' %s %q is not an absolute path", file.what, file.path))
		}
	}
	if p.Port == virtualPort {
		problems = append(problems, fmt.Errorf("peer port %d is taken by the members' addresses on loopback, choose another", p.Port))
	}
	for _, a := range p.Addresses {
		if !a.IsValid() || a.IsUnspecified() {
			problems = append(problems, fmt.Errorf("peer address %v is none", a))
		}
	}
	return errors.Join(problems...)
}

// addrPorts joins the addresses of this machine with its port.
func (p PeerConfig) addrPorts(addrs []netip.Addr) []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range addrs {
		if ap := netip.AddrPortFrom(a.Unmap(), p.Port); !slices.Contains(out, ap) {
			out = append(out, ap)
		}
	}
	return out
}

// Admission is what a new member needs to start, from Store.Admit of another. It can travel as JSON, holds
// nothing secret, and is good until the member is removed.
type Admission struct {
	Cluster string `json:"cluster"` // identity of the cluster's store, hexadecimal
	Name    string `json:"name"`    // of the new member: its Config.MemberName
	ID      string `json:"id"`      // of the new member, hexadecimal
	URL     string `json:"url"`     // of the new member, on loopback
	Members []Peer `json:"members"` // those that were there already
}

// valid reports whether a member could start with it.
func (a *Admission) valid() bool {
	_, err := parseID(a.ID)
	return err == nil && a.Cluster != "" && a.Name != "" && virtualAddress(a.URL).IsValid() && len(a.Members) > 0
}

// Peer is one member as the others know it.
type Peer struct {
	ID        string           `json:"id"` // hexadecimal; a name that is admitted anew has another
	Name      string           `json:"name"`
	URL       string           `json:"url"`           // on loopback; never changes
	Addresses []netip.AddrPort `json:"addresses"`     // where it is, best first
	Seq       uint64           `json:"seq,omitempty"` // grows with every change of Addresses by the member itself
}

// Member is one member of the store, as this one sees it.
type Member struct {
	Name      string
	ID        string // hexadecimal
	Addresses []netip.AddrPort

	Self    bool
	Leader  bool
	Learner bool // has no vote yet: it becomes a voter by itself when it has caught up
	Started bool // has taken part at least once

	// Reachable says that it answered within the last few seconds, and for this member that it is itself in
	// touch with a leader. LastSeen is when it answered last, zero if it has not since this one started.
	Reachable bool
	LastSeen  time.Time
}

// Leadership is who leads the store. Whoever leads runs what must run once in a cluster.
type Leadership struct {
	// Leader is the name of the leading member, empty while there is none or its name is not known.
	Leader string
	// Leading says that this member leads and that a majority has confirmed it in this term.
	Leading bool
	// Term grows with every election.
	Term uint64
}

// virtualPort is the port of the members' addresses on loopback.
const virtualPort = 2378
