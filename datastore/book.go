package datastore

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

// bookFile is the address book's name in the store's directory.
const bookFile = "peers.json"

// book knows where the members are. It is on disk beside the store, because the addresses are needed to reach
// the majority without which the store cannot be read; every member has a copy in the store too, and they tell
// each other what is new (hello.go). What a member says of itself carries a number of its own that only grows,
// so the newer of two statements is known without a clock.
//
// Removed members are taken out by whoever knows of the removal; see retain.
type book struct {
	path string

	mu      sync.Mutex // guards what follows
	content bookContent
}

// bookContent is the file.
type bookContent struct {
	Cluster string `json:"cluster,omitempty"` // identity of the store; empty until it is known
	// Joining is there from the first start of an admitted member until it has taken part.
	Joining bool   `json:"joining,omitempty"`
	Self    Peer   `json:"self"`
	Others  []Peer `json:"others,omitempty"`
}

// errBookDamaged means that the book cannot be read. A store that exists can do without: it has a copy.
var errBookDamaged = errors.New("the members' addresses are damaged")

// newBook has a loopback address for this member and nothing else in it.
func newBook(dir, name string) *book {
	return &book{path: filepath.Join(dir, bookFile), content: bookContent{Self: Peer{Name: name, URL: newVirtualURL()}}}
}

// openBook reads the book of the store in dir, or makes a new one.
func openBook(dir, name string) (*book, error) {
	b := newBook(dir, name)
	data, err := os.ReadFile(b.path)
	if errors.Is(err, os.ErrNotExist) {
		return b, nil
	}
	if err != nil {
		return nil, err
	}
	var c bookContent
	if err := json.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errBookDamaged, b.path, err)
	}
	if !c.Self.address().IsValid() {
		return nil, fmt.Errorf("%w: %s: %q is no address on loopback", errBookDamaged, b.path, c.Self.URL)
	}
	b.content = c
	b.content.Self.Name = name
	return b, nil
}

// save must be called with mu held.
func (b *book) save() error {
	data, err := json.MarshalIndent(b.content, "", "  ")
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(b.path, append(data, '\n'), 0o600)
	return err
}

// admit begins the book of a new member.
func (b *book) admit(a Admission) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content = bookContent{
		Cluster: a.Cluster,
		Joining: true,
		Self:    Peer{ID: a.ID, Name: a.Name, URL: a.URL},
		Others:  slices.Clone(a.Members),
	}
	return b.save()
}

// identify notes what the opened store says of itself.
func (b *book) identify(cluster, id string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content.Cluster, b.content.Self.ID = cluster, id
	return b.save()
}

// joined notes that this member has taken part.
func (b *book) joined() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.content.Joining = false
	return b.save()
}

// moved notes this machine's addresses and reports whether they are news.
func (b *book) moved(addresses []netip.AddrPort) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.content.Self.Seq > 0 && slices.Equal(b.content.Self.Addresses, addresses) {
		return false, nil
	}
	b.content.Self.Addresses = addresses
	b.content.Self.Seq++
	return true, b.save()
}

func (b *book) get() bookContent {
	b.mu.Lock()
	defer b.mu.Unlock()
	c := b.content
	c.Others = slices.Clone(c.Others)
	return c
}

func (b *book) self() Peer { return b.get().Self }

// all are all members, this one first.
func (b *book) all() []Peer {
	c := b.get()
	return append([]Peer{c.Self}, c.Others...)
}

// other returns the member with the identity.
func (b *book) other(id string) (Peer, bool) {
	c := b.get()
	if i := indexPeer(c.Others, id); i >= 0 {
		return c.Others[i], true
	}
	return Peer{}, false
}

// merge takes over what is newer, and reports whether anything is.
func (b *book) merge(peers []Peer) (bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	changed := false
	for _, p := range peers {
		if p.ID == "" {
			continue
		}
		if p.ID == b.content.Self.ID {
			// Somebody remembers more of us than we do: the file was lost, or was an older copy.
			if p.Seq > b.content.Self.Seq {
				b.content.Self.Seq = p.Seq + 1
				changed = true
			}
			continue
		}
		if p.address() == (netip.Addr{}) {
			continue // no address to listen on for it: not a member that we could reach
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
func (b *book) retain(keep func(Peer) bool) (bool, error) {
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

// A member's address for raft is one on loopback that is nobody else's. Raft's membership holds it, so it
// must never change, and it says nothing about where the member is.
var virtualRange = netip.MustParsePrefix("127.64.0.0/10")

func newVirtualURL() string {
	a := virtualRange.Addr().As4()
	r := rand.Uint32()
	a[1] |= byte(r>>16) & 0x3f
	a[2], a[3] = byte(r>>8), byte(r)
	return virtualURL(netip.AddrFrom4(a))
}

func virtualURL(a netip.Addr) string {
	return (&url.URL{Scheme: "https", Host: netip.AddrPortFrom(a, virtualPort).String()}).String()
}

// address is the member's address on loopback, or none if its URL does not have one.
func (p Peer) address() netip.Addr { return virtualAddress(p.URL) }

func virtualAddress(peerURL string) netip.Addr {
	u, err := url.Parse(peerURL)
	if err != nil || u.Scheme != "https" {
		return netip.Addr{}
	}
	ap, err := netip.ParseAddrPort(u.Host)
	if err != nil || ap.Port() != virtualPort || !virtualRange.Contains(ap.Addr()) {
		return netip.Addr{}
	}
	return ap.Addr()
}

// settle notes the address on loopback that raft knows for this member.
func (b *book) settle(memberURL string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if memberURL == b.content.Self.URL || !virtualAddress(memberURL).IsValid() {
		return nil
	}
	b.content.Self.URL = memberURL
	return b.save()
}
