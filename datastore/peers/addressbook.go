package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"kedge/internal/atomicfile"
)

// BookFile is the name of the address book in the store's directory.
const BookFile = "peers.json"

// AddressBook holds the members and their addresses, in a file beside the store: the addresses are needed to reach the
// majority without which the store cannot be read. The store itself holds a copy, and members tell each other about
// changes in heartbeats. Each entry has a sequence number that only its own member increases, so the newer of two entries
// is known without a clock.
//
// Removed members are dropped by members that know of the removal; see [Mesh.Sync].
type AddressBook struct {
	path string

	mu      sync.Mutex // guards content
	content BookContent
}

// BookContent is the content of the file.
type BookContent struct {
	Cluster string `json:"cluster,omitempty"` // cluster ID of the store; empty until it is known
	// Joining is true from the first start of an admitted member until it has taken part in the cluster.
	Joining bool   `json:"joining,omitempty"`
	Self    Peer   `json:"self"`
	Others  []Peer `json:"others,omitempty"`
	// Seal is the checksum of the seal that the last orderly stop wrote; empty while the store is open. It is in this file
	// because an older kedge, which knows no seals and leaves an outdated one behind, drops this field when it writes.
	Seal string `json:"seal,omitempty"`
	// Log is the name of the newest file of the store's log that this member has seen; empty if it has seen none.
	Log string `json:"log,omitempty"`
}

// ErrBookDamaged means that the address book cannot be read. A store that exists does not need it, since it holds a copy.
var ErrBookDamaged = errors.New("the address book of the datastore's members is damaged")

// NewAddressBook returns an address book that holds only this member, with a new loopback address.
func NewAddressBook(dir, name string) *AddressBook {
	return &AddressBook{path: filepath.Join(dir, BookFile), content: BookContent{Self: Peer{Name: name, URL: NewLoopbackURL()}}}
}

// OpenAddressBook reads the address book of the store in dir. If there is none, it returns a new one.
func OpenAddressBook(dir, name string) (*AddressBook, error) {
	b := NewAddressBook(dir, name)
	data, err := os.ReadFile(b.path)
	if errors.Is(err, os.ErrNotExist) {
		return b, nil
	}
	if err != nil {
		return nil, err
	}
	var c BookContent
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrBookDamaged, b.path, err)
	}
	if !c.Self.loopbackAddr().IsValid() {
		return nil, fmt.Errorf("%w: %s: invalid loopback URL %q", ErrBookDamaged, b.path, c.Self.URL)
	}
	b.content = c
	b.content.Self.Name = name
	return b, nil
}

// save writes the file. The caller holds mu.
func (b *AddressBook) save() error {
	data, err := json.MarshalIndent(b.content, "", "  ")
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(b.path, append(data, '\n'), 0o600)
	return err
}

// Begin replaces the content with that of a new member, self, which joins others.
func (b *AddressBook) Begin(cluster string, self Peer, others []Peer) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content = BookContent{Cluster: cluster, Joining: true, Self: self, Others: slices.Clone(others)}
	return b.save()
}

// Identify records the IDs of the cluster and of this member, which the opened store knows.
func (b *AddressBook) Identify(cluster, id string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content.Cluster, b.content.Self.ID, b.content.Seal = cluster, id, ""
	return b.save()
}

// SetLog records the name of the newest file of the store's log.
func (b *AddressBook) SetLog(name string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.content.Log == name {
		return nil
	}
	b.content.Log = name
	return b.save()
}

// SetSeal records the checksum of the seal that an orderly stop has written.
func (b *AddressBook) SetSeal(sum string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content.Seal = sum
	return b.save()
}

// SetJoined records that this member has taken part in the cluster.
func (b *AddressBook) SetJoined() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content.Joining = false
	return b.save()
}

// TookPart reports whether this member has taken part in the cluster, or was the first member of it.
func (b *AddressBook) TookPart() bool {
	c := b.Get()
	return c.Cluster != "" && c.Self.ID != "" && !c.Joining
}

// setAddresses records the addresses of this machine, and reports whether they have changed.
func (b *AddressBook) setAddresses(addresses []netip.AddrPort) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.content.Self.Seq > 0 && slices.Equal(b.content.Self.Addresses, addresses) {
		return false, nil
	}
	b.content.Self.Addresses = addresses
	b.content.Self.Seq++
	return true, b.save()
}

// SetWitness records whether this member is a witness, in the file with the next change.
func (b *AddressBook) SetWitness(witness bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content.Self.Witness = witness
}

// SetSelfURL records the peer URL that raft has for this member. It ignores a URL that has no loopback address.
func (b *AddressBook) SetSelfURL(memberURL string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if memberURL == b.content.Self.URL || !LoopbackAddr(memberURL).IsValid() {
		return nil
	}
	b.content.Self.URL = memberURL
	return b.save()
}

// Path returns the path of the file.
func (b *AddressBook) Path() string { return b.path }

// Get returns a copy of the content.
func (b *AddressBook) Get() BookContent {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.content
	c.Others = slices.Clone(c.Others)
	return c
}

// Self returns this member.
func (b *AddressBook) Self() Peer { return b.Get().Self }

// All returns all members, this one first.
func (b *AddressBook) All() []Peer {
	c := b.Get()
	return append([]Peer{c.Self}, c.Others...)
}

// Other returns the other member with the ID.
func (b *AddressBook) Other(id string) (Peer, bool) {
	c := b.Get()
	if i := indexPeer(c.Others, id); i >= 0 {
		return c.Others[i], true
	}
	return Peer{}, false
}

// Merge takes over entries that are newer than those of the address book, and reports whether there were any.
func (b *AddressBook) Merge(peers []Peer) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	changed := false
	for _, p := range peers {
		if p.ID == "" {
			continue
		}
		if p.ID == b.content.Self.ID {
			// Another member has a newer entry of this one: the file was lost, or replaced with an older copy.
			if p.Seq > b.content.Self.Seq {
				b.content.Self.Seq = p.Seq + 1
				changed = true
			}
			continue
		}
		if p.loopbackAddr() == (netip.Addr{}) {
			continue // the loopback proxy needs an address to listen on
		}
		switch i := indexPeer(b.content.Others, p.ID); {
		case i < 0:
			b.content.Others = append(b.content.Others, p)
			changed = true
		case p.Seq > b.content.Others[i].Seq:
			b.content.Others[i] = p
			changed = true
		}
	}
	if !changed {
		return false, nil
	}
	return true, b.save()
}

// retain drops the members for which keep returns false, and reports whether there were any.
func (b *AddressBook) retain(keep func(Peer) bool) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	before := len(b.content.Others)
	b.content.Others = slices.DeleteFunc(b.content.Others, func(p Peer) bool { return !keep(p) })
	if len(b.content.Others) == before {
		return false, nil
	}
	return true, b.save()
}

func indexPeer(peers []Peer, id string) int {
	return slices.IndexFunc(peers, func(p Peer) bool { return p.ID == id })
}

// loopbackRange holds the loopback addresses of members. Each member has one of its own, at which the raft of every other
// member connects to it. Raft's list of members holds the address, so it never changes, and it does not depend on where
// the member's machine is.
var loopbackRange = netip.MustParsePrefix("127.64.0.0/10")

// NewLoopbackURL returns a peer URL with a random loopback address.
func NewLoopbackURL() string {
	a := loopbackRange.Addr().As4()
	r := rand.Uint32()
	a[1] |= byte(r>>16) & 0x3f
	a[2], a[3] = byte(r>>8), byte(r)
	host := netip.AddrPortFrom(netip.AddrFrom4(a), loopbackPort).String()
	return (&url.URL{Scheme: "https", Host: host}).String()
}

// LoopbackAddr returns the loopback address in a peer URL, or the zero Addr if the URL has none.
func LoopbackAddr(peerURL string) netip.Addr {
	u, err := url.Parse(peerURL)
	if err != nil || u.Scheme != "https" {
		return netip.Addr{}
	}
	ap, err := netip.ParseAddrPort(u.Host)
	if err != nil || ap.Port() != loopbackPort || !loopbackRange.Contains(ap.Addr()) {
		return netip.Addr{}
	}
	return ap.Addr()
}

func (p Peer) loopbackAddr() netip.Addr { return LoopbackAddr(p.URL) }
