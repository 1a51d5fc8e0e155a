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
	// ErrNoRange says that the node has not been given its pod ranges yet.
	ErrNoRange = errors.New("node has no pod address range yet")
	// ErrExhausted says that every address of a range has an owner.
	ErrExhausted = errors.New("all pod addresses of the range are in use")
	// ErrDamaged says that part of the journal cannot be read.
	ErrDamaged = errors.New("lease journal is damaged")
	// ErrLocked says that another process keeps this ledger.
	ErrLocked = errors.New("another process keeps the leases")
)

// Lease is what one owner has.
type Lease struct {
	Owner string          `json:"owner"`
	Addrs []netip.Addr    `json:"addrs"`          // one of each range, in the order of the ranges
	Note  json.RawMessage `json:"note,omitempty"` // the caller's, kept as it is
}

// Ledger keeps the leases of a node. It may be used from many goroutines.
type Ledger struct {
	lock *os.File // flock: one process a ledger
	boot string

	mu      sync.Mutex // guards what follows
	journal *journal
	pools   []*pool
	leases  map[string]Lease
	used    map[netip.Addr]string // owner
	freed   []netip.Addr          // longest ago first
	resting map[netip.Addr]bool   // the same addresses as freed
}

// Open takes the ledger in dir, which it creates. boot is the identity of the
// running kernel; see BootID. The error is ErrDamaged, with a usable ledger of
// what could be read, when part of the journal is lost: the caller then adopts
// what it still finds in the kernel.
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
		journal: &journal{path: journalPath(dir), create: create},
		leases:  map[string]Lease{},
		used:    map[netip.Addr]string{},
		resting: map[netip.Addr]bool{},
	}
	entries, damage := load(l.journal.path, boot)
	if damage != nil && !errors.Is(damage, ErrDamaged) {
		return nil, errors.Join(fmt.Errorf("open lease ledger: %w", damage), lock.Close())
	}
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

// SetRanges says from which ranges new leases are made: one address of each.
// Leases made before stay as they are.
func (l *Ledger) SetRanges(ranges []netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pools = nil
	for _, p := range ranges {
		l.pools = append(l.pools, newPool(p, l.boot))
	}
}

// Allocate gives owner one address of each range. An owner that has a lease
// gets the same addresses again, with the new note.
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

// Adopt records a lease whose addresses are known from elsewhere, because the
// journal lost it. It fails when one of them has another owner.
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

// Release ends the lease of owner. One that has none is released already.
// After an error the owner keeps the lease.
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

// pick finds the address of a pool whose last use is longest ago.
func (l *Ledger) pick(p *pool) (netip.Addr, bool) {
	busy := func(a netip.Addr) bool { return l.used[a] != "" || l.resting[a] }
	if addr, ok := p.fresh(busy); ok {
		return addr, true
	}
	for _, a := range l.freed {
		if p.contains(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// commit makes an entry durable and then true, in this order.
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

// apply changes the state in memory as an entry says.
func (l *Ledger) apply(e entry) {
	switch {
	case e.Add != nil:
		for _, a := range l.leases[e.Add.Owner].Addrs {
			if !slices.Contains(e.Add.Addrs, a) {
				delete(l.used, a)
				l.rest(a)
			}
		}
		l.leases[e.Add.Owner] = *e.Add
		for _, a := range e.Add.Addrs {
			l.used[a] = e.Add.Owner
			if l.resting[a] {
				delete(l.resting, a)
				l.freed = slices.DeleteFunc(l.freed, func(f netip.Addr) bool { return f == a })
			}
		}
	case e.Del != "":
		for _, a := range l.leases[e.Del].Addrs {
			delete(l.used, a)
			l.rest(a)
		}
		delete(l.leases, e.Del)
	default:
		for _, a := range e.Freed {
			l.rest(a)
		}
	}
}

func (l *Ledger) rest(a netip.Addr) {
	if !l.resting[a] {
		l.resting[a] = true
		l.freed = append(l.freed, a)
	}
}

// snapshot returns the shortest journal that leads to the present state.
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
