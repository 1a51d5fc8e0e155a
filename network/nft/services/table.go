package services

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"

	"kedge/network/nft"
)

// Table is the table of one node's services. The cost of changing a service does not depend
// on the number of services.
type Table struct {
	name string
	cfg  Config

	mu       sync.Mutex // one transaction at a time; guards what follows
	services map[string]*renderedService
	claims   map[frontend][]string // names of the services with a frontend, sorted; the first owns it
	want     map[ref]wanted        // all elements of the wanted content
	synced   bool                  // the kernel was given all of want
	adopted  bool                  // this process has written the rules
	chains   map[string]nft.Chain  // of the elements of kindChains
	unused   map[string]time.Time  // chains without a reference, and since when
	now      func() time.Time
	socket   nft.Socket
}

type renderedService struct {
	Service
	elements []element
}

// wanted is the value of an element and the number of services that need it.
type wanted struct {
	val string
	n   int
}

// NewTable returns the table of a node without touching the kernel.
func NewTable(node string, cfg Config) *Table {
	return &Table{
		name: nft.TableName(node, "services"), cfg: cfg,
		services: map[string]*renderedService{}, claims: map[frontend][]string{},
		want: map[ref]wanted{}, chains: map[string]nft.Chain{}, unused: map[string]time.Time{}, now: time.Now,
	}
}

// Close closes the connection to the kernel. Rules stay, and the next write opens another
// connection.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.socket.Close()
}

// Name returns the table's name; its family is inet.
func (t *Table) Name() string { return t.name }

// Apply replaces services by name; a service without ports is removed. After an error the
// rules are unchanged, and the next Apply or Repair writes the difference.
//
// If several services claim the same address and port, or the same node port, the service
// whose name sorts first gets it.
func (t *Table) Apply(changes map[string]Service) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.record(changes)
	t.removeUnused()
	if !t.synced {
		_, err := t.synchronize()
		return err
	}
	if err := t.write(t.difference(before)); err != nil {
		t.synced = false
		// Most likely another program removed the table.
		if _, syncErr := t.synchronize(); syncErr != nil {
			return errors.Join(err, syncErr)
		}
	}
	return nil
}

// SetNodePortsOn sets the addresses of the node at which node ports are reachable. The next
// Apply writes the change.
func (t *Table) SetNodePortsOn(ranges []netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cfg.NodePortsOn = ranges
	t.synced = false
}

// Repair compares the kernel with the wanted content, writes the difference, and returns
// the number of elements and chains that differed.
func (t *Table) Repair() (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.adopted {
		return 0, nil // nothing was applied yet
	}
	t.removeUnused()
	return t.synchronize()
}

// presence is the state of an element before a change.
type presence struct {
	val   string
	there bool
}

// record stores the changes and returns the previous state of the elements that they
// affect.
func (t *Table) record(changes map[string]Service) map[ref]presence {
	affected := map[string]bool{}
	for name, next := range changes {
		affected[name] = true
		was := t.services[name]
		if was != nil {
			for _, f := range was.frontends() {
				t.release(f, name, affected)
			}
		}
		if len(next.Ports) == 0 {
			if was != nil {
				was.Ports = nil
			}
			continue
		}
		if was == nil {
			was = &renderedService{}
			t.services[name] = was
		}
		was.Ports = withIndexes(was.Ports, next.Ports)
		for _, f := range was.frontends() {
			t.claim(f, name, affected)
		}
	}
	before := map[ref]presence{}
	for name := range affected {
		s := t.services[name]
		if s == nil {
			continue
		}
		old := s.elements
		s.elements = nil
		for i := range s.Ports {
			s.elements = append(s.elements, s.Ports[i].elements(t.cfg, t.chains, func(f frontend) bool { return t.claims[f][0] == name })...)
		}
		for _, e := range s.elements { // before the old ones, so that unchanged elements never reach zero
			t.add(e, 1, before)
		}
		for _, e := range old {
			t.add(e, -1, before)
		}
		if len(s.Ports) == 0 {
			delete(t.services, name)
		}
	}
	return before
}

// add changes the number of services that need an element by n.
func (t *Table) add(e element, n int, before map[ref]presence) {
	w, there := t.want[e.ref]
	if _, ok := before[e.ref]; !ok {
		before[e.ref] = presence{w.val, there}
	}
	w.n += n
	if n > 0 {
		w.val = e.val
	}
	if w.n > 0 {
		t.want[e.ref] = w
	} else {
		delete(t.want, e.ref)
	}
}

func (s *renderedService) frontends() []frontend {
	var out []frontend
	for i := range s.Ports {
		out = append(out, s.Ports[i].frontends()...)
	}
	return out
}

// claim records that a service has a frontend, and marks the service that loses it as
// affected.
func (t *Table) claim(f frontend, name string, affected map[string]bool) {
	list := t.claims[f]
	at, found := slices.BinarySearch(list, name)
	if found {
		return // two equal ports of one service, which the API does not allow
	}
	if at == 0 && len(list) > 0 {
		affected[list[0]] = true
	}
	t.claims[f] = slices.Insert(slices.Clip(list), at, name)
}

// release records that a service no longer has a frontend, and marks the service that gets
// it as affected.
func (t *Table) release(f frontend, name string, affected map[string]bool) {
	list := t.claims[f]
	at, found := slices.BinarySearch(list, name)
	if !found {
		return
	}
	list = slices.Delete(list, at, at+1)
	if len(list) == 0 {
		delete(t.claims, f)
		return
	}
	if at == 0 {
		affected[list[0]] = true
	}
	t.claims[f] = list
}

// withIndexes returns next with endpoints at the indexes that they have in old.
func withIndexes(old, next []Port) []Port {
	next = slices.Clone(next)
	for i := range next {
		p := &next[i]
		at := slices.IndexFunc(old, func(o Port) bool { return o.clusterFrontend() == p.clusterFrontend() })
		if at >= 0 {
			p.Cluster, p.Local = keepIndexes(old[at].Cluster, p.Cluster), keepIndexes(old[at].Local, p.Local)
		}
	}
	return next
}

// delta is the content of a transaction.
type delta struct {
	remove, add []element
	chains      []nft.Chain // to be rewritten
	unused      []string    // chains to which nothing leads any more
}

func (d delta) size() int { return len(d.remove) + len(d.add) + len(d.chains) }

// difference returns the delta from before to the wanted content.
func (t *Table) difference(before map[ref]presence) delta {
	var d delta
	for r, was := range before {
		is, ok := t.want[r]
		if ok && was.there && is.val == was.val {
			continue
		}
		switch {
		case r.set.kind == kindChains && ok:
			d.chains = append(d.chains, t.chains[r.key])
		case r.set.kind == kindChains:
			d.unused = append(d.unused, r.key)
		default:
			if was.there {
				d.remove = append(d.remove, element{r, was.val})
			}
			if ok {
				d.add = append(d.add, element{r, is.val})
			}
		}
	}
	return d
}

// write applies a delta in one transaction.
func (t *Table) write(d delta) error {
	if d.size() > 0 {
		tx, err := nft.Begin(t.name)
		if err != nil {
			return err
		}
		tx.SetChains(d.chains)
		forEachSet(d.remove, tx.DeleteElements)
		forEachSet(d.add, tx.AddElements)
		if err := t.socket.Commit(tx); err != nil {
			return err
		}
	}
	t.noteUnused(d)
	return nil
}

func (t *Table) noteUnused(d delta) {
	for _, name := range d.unused {
		t.unused[name] = t.now()
		delete(t.chains, name)
	}
	for _, c := range d.chains {
		delete(t.unused, c.Name)
	}
}

// chainGracePeriod is the time for which unreferenced chains stay: kernels before 6.2 keep
// a reference to a chain for a moment after the last element with it was removed.
const chainGracePeriod = 2 * time.Second

// removeUnused removes chains that have been unreferenced for chainGracePeriod.
func (t *Table) removeUnused() {
	var old []string
	for name, since := range t.unused {
		if t.now().Sub(since) > chainGracePeriod {
			old = append(old, name)
		}
	}
	if len(old) == 0 {
		return
	}
	tx, err := nft.Begin(t.name)
	if err != nil {
		return
	}
	for _, name := range old { // the rules first: they jump to other chains
		tx.FlushChain(name)
	}
	for _, name := range old {
		tx.DeleteChain(name)
		t.unused[name] = t.now() // the time of the next attempt counts from here
	}
	if t.socket.Commit(tx) != nil {
		return
	}
	maps.DeleteFunc(t.unused, func(name string, _ time.Time) bool { return slices.Contains(old, name) })
}

// forEachSet calls tell for each set with its elements.
func forEachSet(elements []element, tell func(nftables.Set, []nftables.SetElement)) {
	bySet := map[setID][]nftables.SetElement{}
	for _, e := range elements {
		bySet[e.set] = append(bySet[e.set], e.kernel())
	}
	for id, list := range bySet {
		tell(*id.describe().In(nil), list)
	}
}

func (t *Table) table() *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
}
