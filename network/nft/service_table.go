package nft

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
)

// ServiceTable is the table of one node's services. What a change of a service
// costs depends on the service, not on how many there are.
type ServiceTable struct {
	name string
	cfg  ServiceConfig

	mu       sync.Mutex // one transaction at a time; guards what follows
	services map[string]*renderedService
	holders  map[frontend][]string // who wants a frontend, in order; the first has it
	want     map[ref]wanted        // every element that the kernel should have
	inStep   bool                  // the kernel was given all of want
	adopted  bool                  // the rules are this process's
	chains   map[string]chain      // of the elements of kindChains
	unused   map[string]time.Time  // chains that no element leads to any more, since when
	now      func() time.Time
	socket   socket
}

type renderedService struct {
	Service
	elements []element
}

// wanted is the value of an element and how many services need it.
type wanted struct {
	val string
	n   int
}

// NewServiceTable returns the table of a node without touching the kernel.
func NewServiceTable(node string, cfg ServiceConfig) *ServiceTable {
	return &ServiceTable{
		name: TableName(node, "services"), cfg: cfg,
		services: map[string]*renderedService{}, holders: map[frontend][]string{},
		want: map[ref]wanted{}, chains: map[string]chain{}, unused: map[string]time.Time{}, now: time.Now,
	}
}

// Close ends the connection to the kernel. Rules stay, and the next use opens
// another.
func (t *ServiceTable) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.socket.close()
}

// Name returns the table's name; its family is inet.
func (t *ServiceTable) Name() string { return t.name }

// Apply makes the services what changes says, by their names; one without ports
// is removed. After an error the rules are what they were, and the next Apply or
// Repair makes up for it.
//
// Where several services claim an address and port, or a node port, the one whose
// name comes first has it.
func (t *ServiceTable) Apply(changes map[string]Service) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.record(changes)
	t.retire()
	if !t.inStep {
		_, err := t.synchronize()
		return err
	}
	if err := t.write(t.difference(before)); err != nil {
		t.inStep = false
		// Most likely somebody removed the table.
		if _, again := t.synchronize(); again != nil {
			return errors.Join(err, again)
		}
	}
	return nil
}

// SetNodePortsOn says at which addresses of the node node ports answer from now on. The
// next Apply writes it.
func (t *ServiceTable) SetNodePortsOn(ranges []netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cfg.NodePortsOn = ranges
	t.inStep = false
}

// Repair compares the kernel with what should be, mends the difference and says
// how many elements and chains it was.
func (t *ServiceTable) Repair() (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.adopted {
		return 0, nil // nothing was applied yet
	}
	t.retire()
	return t.synchronize()
}

// presence is what an element was before a change.
type presence struct {
	val   string
	there bool
}

// record takes the changes over and returns what the elements that they touch
// were before.
func (t *ServiceTable) record(changes map[string]Service) map[ref]presence {
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
		was.Ports = withPlaces(was.Ports, next.Ports)
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
			s.elements = append(s.elements, s.Ports[i].elements(t.cfg, t.chains, func(f frontend) bool { return t.holders[f][0] == name })...)
		}
		for _, e := range s.elements { // those that stay never reach zero
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

// add counts one more or one less who needs an element.
func (t *ServiceTable) add(e element, n int, before map[ref]presence) {
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

// claim notes that a service wants a frontend, and who loses it by that.
func (t *ServiceTable) claim(f frontend, name string, affected map[string]bool) {
	list := t.holders[f]
	at, found := slices.BinarySearch(list, name)
	if found {
		return // two ports of one service, which the API does not allow
	}
	if at == 0 && len(list) > 0 {
		affected[list[0]] = true
	}
	t.holders[f] = slices.Insert(slices.Clip(list), at, name)
}

// release notes that a service wants a frontend no more, and who has it now.
func (t *ServiceTable) release(f frontend, name string, affected map[string]bool) {
	list := t.holders[f]
	at, found := slices.BinarySearch(list, name)
	if !found {
		return
	}
	list = slices.Delete(list, at, at+1)
	if len(list) == 0 {
		delete(t.holders, f)
		return
	}
	if at == 0 {
		affected[list[0]] = true
	}
	t.holders[f] = list
}

// withPlaces returns next with endpoints in the places that they have in old.
func withPlaces(old, next []ServicePort) []ServicePort {
	next = slices.Clone(next)
	for i := range next {
		p := &next[i]
		at := slices.IndexFunc(old, func(o ServicePort) bool { return o.clusterFrontend() == p.clusterFrontend() })
		if at >= 0 {
			p.Cluster, p.Local = keepPlaces(old[at].Cluster, p.Cluster), keepPlaces(old[at].Local, p.Local)
		}
	}
	return next
}

// delta is what a transaction changes.
type delta struct {
	remove, add []element
	chains      []chain  // to be written anew
	unused      []string // chains to which nothing leads any more
}

func (d delta) size() int { return len(d.remove) + len(d.add) + len(d.chains) }

// difference returns what leads from before to what is wanted now.
func (t *ServiceTable) difference(before map[ref]presence) delta {
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

// write makes a delta true in one transaction.
func (t *ServiceTable) write(d delta) error {
	if d.size() > 0 {
		tx, err := begin(t.name)
		if err != nil {
			return err
		}
		tx.setChains(d.chains)
		queue(d.remove, tx.delElements)
		queue(d.add, tx.addElements)
		if err := t.socket.commit(tx); err != nil {
			return err
		}
	}
	t.noteUnused(d)
	return nil
}

func (t *ServiceTable) noteUnused(d delta) {
	for _, name := range d.unused {
		t.unused[name] = t.now()
		delete(t.chains, name)
	}
	for _, c := range d.chains {
		delete(t.unused, c.name)
	}
}

// linger is how long chains stay when nothing leads to them any more: kernels before
// 6.2 hold on to one for a moment after the last element that led to it.
const linger = 2 * time.Second

// retire removes chains that have not been used for a while.
func (t *ServiceTable) retire() {
	var old []string
	for name, since := range t.unused {
		if t.now().Sub(since) > linger {
			old = append(old, name)
		}
	}
	if len(old) == 0 {
		return
	}
	tx, err := begin(t.name)
	if err != nil {
		return
	}
	for _, name := range old { // the rules first: they lead to other chains
		tx.flushChain(name)
	}
	for _, name := range old {
		tx.delChain(name)
		t.unused[name] = t.now() // when it is tried again
	}
	if t.socket.commit(tx) != nil {
		return
	}
	maps.DeleteFunc(t.unused, func(name string, _ time.Time) bool { return slices.Contains(old, name) })
}

// queue tells a transaction of elements, set by set.
func queue(elements []element, tell func(nftables.Set, []nftables.SetElement)) {
	bySet := map[setID][]nftables.SetElement{}
	for _, e := range elements {
		bySet[e.set] = append(bySet[e.set], e.kernel())
	}
	for id, list := range bySet {
		tell(*id.describe().of(nil), list)
	}
}

func (t *ServiceTable) table() *nftables.Table {
	return &nftables.Table{Name: t.name, Family: nftables.TableFamilyINet}
}
