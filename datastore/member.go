package datastore

import (
	"net/netip"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"

	"kedge/datastore/peers"
)

// PeerConfig says how the members of the store reach each other. Peer is the entry of a member in the address book.
type (
	PeerConfig = peers.Config
	Peer       = peers.Peer
)

// PeerServerName is the DNS name in the certificate of every member.
const PeerServerName = peers.ServerName

// Admission is the data with which a new member starts, from Store.Admit of another member. It can be sent as JSON, holds
// no secrets, and is valid until the member is removed.
type Admission struct {
	Cluster string `json:"cluster"` // cluster ID of the store, hexadecimal
	Name    string `json:"name"`    // of the new member: its Config.MemberName
	ID      string `json:"id"`      // of the new member, hexadecimal
	URL     string `json:"url"`     // of the new member, with its loopback address
	Members []Peer `json:"members"` // the other members
	// External says that the datastore is an etcd outside of kedge (package external): there is nothing else in the admission but
	// the name.
	External bool `json:"external,omitempty"`
}

// valid reports whether a member can start with the admission.
func (a *Admission) valid() bool {
	_, err := types.IDFromString(a.ID)
	return err == nil && a.Cluster != "" && a.Name != "" && peers.LoopbackAddr(a.URL).IsValid() && len(a.Members) > 0
}

// Member is one member of the store, as this member sees it.
type Member struct {
	Name      string
	ID        string // hexadecimal
	Addresses []netip.AddrPort

	Self    bool
	Leader  bool
	Learner bool // has no vote yet; the leader promotes it when it has caught up
	Witness bool // has no API server; see Config.Witness
	Started bool // has started at least once

	// Reachable means that the member answered a heartbeat within the last few seconds; for this member, that it has a
	// leader. LastSeen is the time of the last answer, zero if there was none since this member started.
	Reachable bool
	LastSeen  time.Time
}

// Leadership names the leader of the store. The leader also runs the components that must run once in a cluster.
type Leadership struct {
	// Leader is the name of the leader, empty while there is none or its name is unknown.
	Leader string
	// Leading means that this member leads and that a majority has confirmed it in this term.
	Leading bool
	// Term increases with every election.
	Term uint64
}
