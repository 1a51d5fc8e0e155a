package policies

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
)

// Commit writes the staged changes. After an error nothing is written, and the next Commit
// writes all of them. If the kernel's table is not what the last Commit left, Commit
// rewrites the whole table, and Damaged returns the reason.
func (t *Table) Commit() error {
	t.damage = nil
	empty := len(t.subjects) == 0
	switch {
	case !t.known:
		// The first Commit keeps the table of an earlier process if it is right, so that a
		// restart changes nothing.
		ok, err := t.intact()
		if ok && err == nil {
			break
		}
		return t.rewrite()
	case empty != !t.present:
		return t.rewrite()
	case empty:
		// There is no table, and none is needed.
	default:
		if err := t.update(); err != nil {
			t.damage = err
			return t.rewrite()
		}
	}
	t.known, t.present = true, !empty
	t.resetChanges()
	return nil
}

// Damaged returns why the last Commit rewrote the whole table instead of the difference, or
// nil.
func (t *Table) Damaged() error { return t.damage }

// rewrite writes the whole table, in one transaction.
func (t *Table) rewrite() error {
	tx, err := nft.Begin(t.name)
	if err != nil {
		return err
	}
	if len(t.subjects) == 0 {
		tx.Remove()
	} else {
		tx.Recreate()
		for _, f := range []nft.Family{nft.V4, nft.V6} {
			for _, d := range []Direction{Egress, Ingress} {
				tx.AddSet(subjectMap(d, f), nil)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(t.sets)) {
			s := t.sets[name]
			tx.AddSet(s.ref(name), s.encode(slices.Collect(maps.Keys(s.elements))))
		}
		for _, c := range hooks() {
			tx.AddChain(c)
			tx.AddRules(c.Name, c.Rules)
		}
		for name := range t.chains {
			tx.AddChain(nft.Chain{Name: name})
		}
		for name, c := range t.chains {
			tx.AddRules(name, t.render(c))
		}
		eachSubjectMap(t.subjects, tx.AddElements)
	}
	if err := t.socket.Commit(tx); err != nil {
		t.known = false
		return err
	}
	t.known, t.present = true, len(t.subjects) > 0
	t.resetChanges()
	return nil
}

// RemoveTable removes the policy table that an earlier process left on a node.
func RemoveTable(node string) error {
	tx, err := nft.Begin(nft.TableName(node, "policy"))
	if err != nil {
		return err
	}
	tx.Remove()
	return tx.Commit()
}

// update writes the differences to the last Commit. The order matters: an object must exist
// before it is used, and must not be used any more when it is removed.
func (t *Table) update() error {
	tx, err := nft.Begin(t.name)
	if err != nil {
		return err
	}
	for name, existed := range t.oldSets {
		if s := t.sets[name]; s != nil && !existed {
			tx.AddSet(s.ref(name), s.encode(slices.Collect(maps.Keys(s.elements))))
		}
	}
	for name, existed := range t.oldChains {
		if _, exists := t.chains[name]; exists && !existed {
			tx.AddChain(nft.Chain{Name: name})
		}
	}
	for name, existed := range t.oldChains {
		if c, exists := t.chains[name]; exists {
			if existed {
				tx.FlushChain(name)
			}
			tx.AddRules(name, t.render(c))
		}
	}
	t.updateElements(tx)
	t.updateSubjects(tx)
	gone := func(name string) bool { _, exists := t.chains[name]; return t.oldChains[name] && !exists }
	for name := range t.oldChains {
		if gone(name) {
			tx.FlushChain(name) // all of them first: they may jump to each other
		}
	}
	for name := range t.oldChains {
		if gone(name) {
			tx.DeleteChain(name)
		}
	}
	for name, existed := range t.oldSets {
		if existed && t.sets[name] == nil {
			tx.DeleteSet(name)
		}
	}
	return t.socket.Commit(tx)
}

func (t *Table) updateElements(tx *nft.Transaction) {
	for name, old := range t.oldElements {
		s := t.sets[name]
		if existed, touched := t.oldSets[name]; s == nil || touched && !existed {
			continue // removed, or added together with its elements
		}
		var add, del []Element
		for e, existed := range old {
			switch exists := s.elements[e] > 0; {
			case exists && !existed:
				add = append(add, e)
			case !exists && existed:
				del = append(del, e)
			}
		}
		tx.DeleteElements(s.ref(name), s.encode(del))
		tx.AddElements(s.ref(name), s.encode(add))
	}
}

func (t *Table) updateSubjects(tx *nft.Transaction) {
	add, del := map[subject]string{}, map[subject]string{}
	for s, before := range t.oldSubjects {
		now := t.subjects[s]
		if now == before {
			continue
		}
		if before != "" {
			del[s] = before
		}
		if now != "" {
			add[s] = now
		}
	}
	eachSubjectMap(del, tx.DeleteElements)
	eachSubjectMap(add, tx.AddElements)
}

// eachSubjectMap distributes subjects over the maps of the kernel.
func eachSubjectMap(subjects map[subject]string, do func(nftables.Set, []nftables.SetElement)) {
	type which struct {
		d  Direction
		v6 bool
	}
	elements := map[which][]nftables.SetElement{}
	for s, chain := range subjects {
		w := which{s.direction, s.addr.Is6()}
		elements[w] = append(elements[w], nftables.SetElement{Key: s.addr.AsSlice(), VerdictData: chainVerdict(chain)})
	}
	for w, e := range elements {
		do(subjectMap(w.d, familyFor(w.v6)), e)
	}
}

func chainVerdict(chain string) *expr.Verdict {
	if chain == DenyAll {
		return &expr.Verdict{Kind: expr.VerdictDrop}
	}
	return &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}
}

// Isolate denies all connections of the addresses of a new pod, immediately and
// independently of the staged changes. It is for the time before the first Commit, in which
// the rules of an earlier process stay in force for all other pods. The caller stages the
// same for that Commit.
func (t *Table) Isolate(addrs []netip.Addr) error {
	for _, a := range addrs {
		for _, d := range []Direction{Egress, Ingress} {
			if err := t.isolate(map[subject]string{{d, a}: DenyAll}); err != nil {
				return fmt.Errorf("refuse connections of new pod %s: %w", a, err)
			}
		}
	}
	return nil
}

func (t *Table) isolate(one map[subject]string) error {
	try := func(steps ...func(*nft.Transaction)) error {
		tx, err := nft.Begin(t.name)
		if err != nil {
			return err
		}
		for _, step := range steps {
			step(tx)
		}
		return t.socket.Commit(tx)
	}
	add := func(tx *nft.Transaction) { eachSubjectMap(one, tx.AddElements) }
	del := func(tx *nft.Transaction) { eachSubjectMap(one, tx.DeleteElements) }
	err := try(add)
	switch {
	case errors.Is(err, unix.EEXIST): // left by an earlier owner of the address
		return try(del, add)
	case errors.Is(err, unix.ENOENT): // there is no table
		only := Table{name: t.name, subjects: one}
		return errors.Join(only.rewrite(), only.Close())
	}
	return err
}

// Close closes the connection to the kernel. The table stays and may be used again.
func (t *Table) Close() error { return t.socket.Close() }

// Repair rewrites the table if the kernel does not have the content of the last Commit, and
// reports whether it did.
func (t *Table) Repair() (bool, error) {
	if !t.known {
		return false, nil // the next Commit compares
	}
	ok, err := t.intact()
	if ok && err == nil {
		return false, nil
	}
	// An unreadable table is treated as damaged: rewriting does no harm.
	if err := t.rewrite(); err != nil {
		return false, fmt.Errorf("repair: %w", err)
	}
	return true, nil
}
