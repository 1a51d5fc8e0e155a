package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoRange means that the node has not received its pod ranges yet.
	ErrNoRange = errors.New("node has no pod address range yet")
	// ErrExhausted means that every address of a range has an owner.
	ErrExhausted = errors.New("all pod addresses of the range are in use")
	// ErrDamaged means that part of the journal cannot be read.
	ErrDamaged = errors.New("lease journal is damaged")
	// ErrLocked means that another process has opened this ledger.
	ErrLocked = errors.New("another process has the lease ledger open")
)

// Lease is the set of addresses of one owner.
type Lease struct {
	Owner string          `json:"owner"`
	Addrs []netip.Addr    `json:"addrs"`          // one of each range, in the order of the ranges
	Note  json.RawMessage `json:"note,omitempty"` // data of the caller, stored unchanged
}

// Ledger keeps the leases of a node. It may be used from many goroutines.
type Ledger struct {
	lock *os.File // flock: one process for each ledger
	boot string

	mu       sync.Mutex // guards what follows
	journal  *journal
	pools    []*pool
	leases   map[string]Lease
	used     map[netip.Addr]string // owner
	freed    []netip.Addr          // longest ago first
	freedSet map[netip.Addr]bool   // the addresses in freed
	inUse    func(netip.Addr) bool // reports that an address is in use without a lease; may be nil
}

// Open opens the ledger in dir, which it creates. boot is the identity of the running
// kernel; see BootID. If part of the journal is damaged, the error is ErrDamaged, and the
// ledger has the entries that could be read. A missing or truncated journal is not an error
// and cannot be distinguished from a new one: the caller adopts the interfaces in the
// kernel in any case.
func Open(dir, boot string) (*Ledger, error) {
	return open(dir, boot, createFile)
}

func open(dir, boot string, create func(string) (file, error)) (*Ledger, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open lease ledger: %w", err)
	}
	lock, err := lockFile(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("open lease ledger %s: %w", dir, err)
	}
	l := &Ledger{
		lock: lock, boot: boot,
		journal:  &journal{path: journalPath(dir), boot: boot, create: create},
		leases:   map[string]Lease{},
		used:     map[netip.Addr]string{},
		freedSet: map[netip.Addr]bool{},
	}
	entries, damage := load(l.journal.path, boot)
	for _, e := range entries {
		l.apply(e)
	}
	if err := l.journal.rewrite(l.snapshot()); err != nil {
		return nil, errors.Join(fmt.Errorf("open lease ledger: %w", err), lock.Close())
	}
	return l, damage
}

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrLocked
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Close lets another process open the ledger. The leases stay.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.journal.close(), l.lock.Close())
}

// SetRanges sets the ranges of new leases: one address from each. Existing leases do not
// change.
func (l *Ledger) SetRanges(ranges []netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pools = nil
	for _, p := range ranges {
		l.pools = append(l.pools, newPool(p, l.boot))
	}
}

// Avoid excludes addresses from new leases that are in use without a lease, for example by
// an interface.
func (l *Ledger) Avoid(taken func(netip.Addr) bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.inUse = taken
}

// Allocate gives owner one address of each range. An owner with a lease gets the same
// addresses again, with the new note.
func (l *Ledger) Allocate(owner string, note json.RawMessage) (Lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lease := Lease{Owner: owner, Note: note}
	if old, ok := l.leases[owner]; ok {
		lease.Addrs = old.Addrs
	} else {
		if len(l.pools) == 0 {
			return Lease{}, ErrNoRange
		}
		for _, p := range l.pools {
			addr, ok := l.pick(p)
			if !ok {
				return Lease{}, fmt.Errorf("%w: %s", ErrExhausted, p.prefix)
			}
			lease.Addrs = append(lease.Addrs, addr)
		}
	}
	if err := l.commit(entry{Add: &lease}); err != nil {
		return Lease{}, fmt.Errorf("record lease of %s: %w", owner, err)
	}
	return lease, nil
}

// Adopt records a lease whose addresses are known from the kernel, because the journal lost
// it. It fails if one of the addresses has another owner.
func (l *Ledger) Adopt(lease Lease) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, a := range lease.Addrs {
		if owner, ok := l.used[a]; ok && owner != lease.Owner {
			return fmt.Errorf("adopt lease of %s: %s belongs to %s", lease.Owner, a, owner)
		}
	}
	if err := l.commit(entry{Add: &lease}); err != nil {
		return fmt.Errorf("record lease of %s: %w", lease.Owner, err)
	}
	return nil
}

// Release ends the lease of owner. An owner without a lease is not an error. After an error
// the owner keeps the lease.
func (l *Ledger) Release(owner string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.leases[owner]; !ok {
		return nil
	}
	if err := l.commit(entry{Del: owner}); err != nil {
		return fmt.Errorf("record release of %s: %w", owner, err)
	}
	return nil
}

// Get returns the lease of owner.
func (l *Ledger) Get(owner string) (Lease, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lease, ok := l.leases[owner]
	return lease, ok
}

// Leases returns all leases, ordered by owner.
func (l *Ledger) Leases() []Lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sorted()
}

// pick returns the address of a pool whose last use was longest ago.
func (l *Ledger) pick(p *pool) (netip.Addr, bool) {
	busy := func(a netip.Addr) bool { return l.used[a] != "" || l.freedSet[a] }
	for {
		addr, ok := p.fresh(busy)
		if !ok {
			break
		}
		if !l.isInUse(addr) {
			return addr, true
		}
		l.addFreed(addr) // it becomes available when its user is gone
	}
	for _, a := range l.freed {
		if p.contains(a) && !l.isInUse(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func (l *Ledger) isInUse(a netip.Addr) bool { return l.inUse != nil && l.inUse(a) }

// commit writes an entry to the journal and then applies it.
func (l *Ledger) commit(e entry) error {
	if l.journal.broken || l.journal.entries >= compactAfter {
		if err := l.journal.rewrite(l.snapshot()); err != nil && l.journal.broken {
			return err
		}
	}
	if err := l.journal.append(e); err != nil {
		return err
	}
	l.apply(e)
	return nil
}

// apply changes the state in memory according to an entry.
func (l *Ledger) apply(e entry) {
	switch {
	case e.Add != nil:
		for _, a := range l.leases[e.Add.Owner].Addrs {
			if !slices.Contains(e.Add.Addrs, a) {
				delete(l.used, a)
				l.addFreed(a)
			}
		}
		l.leases[e.Add.Owner] = *e.Add
		for _, a := range e.Add.Addrs {
			if other := l.used[a]; other != "" && other != e.Add.Owner {
				l.apply(entry{Del: other}) // the entry that released it is lost
			}
			l.used[a] = e.Add.Owner
			if l.freedSet[a] {
				delete(l.freedSet, a)
				l.freed = slices.DeleteFunc(l.freed, func(f netip.Addr) bool { return f == a })
			}
		}
	case e.Del != "":
		for _, a := range l.leases[e.Del].Addrs {
			delete(l.used, a)
			l.addFreed(a)
		}
		delete(l.leases, e.Del)
	default:
		for _, a := range e.Freed {
			l.addFreed(a)
		}
	}
}

func (l *Ledger) addFreed(a netip.Addr) {
	if !l.freedSet[a] {
		l.freedSet[a] = true
		l.freed = append(l.freed, a)
	}
}

// snapshot returns the shortest journal for the current state.
func (l *Ledger) snapshot() []entry {
	entries := []entry{{Version: journalVersion, Boot: l.boot}}
	if len(l.freed) > 0 {
		entries = append(entries, entry{Freed: slices.Clone(l.freed)})
	}
	for _, lease := range l.sorted() {
		entries = append(entries, entry{Add: &lease})
	}
	return entries
}

func (l *Ledger) sorted() []Lease {
	leases := make([]Lease, 0, len(l.leases))
	for _, lease := range l.leases {
		leases = append(leases, lease)
	}
	slices.SortFunc(leases, func(a, b Lease) int {
		switch {
		case a.Owner < b.Owner:
			return -1
		case a.Owner > b.Owner:
			return 1
		}
		return 0
	})
	return leases
}
