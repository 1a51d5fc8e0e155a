package nft

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Commit makes true what was staged. After an error nothing of it is, and the
// next Commit tries again with all of it. Where the table turns out not to be what
// the last Commit left, it is written anew; Damaged then says so.
func (t *PolicyTable) Commit() error {
	t.damage = nil
	empty := len(t.subjects) == 0
	switch {
	case !t.known:
		// First time: what an earlier process wrote stays if it is right, so that
		// a restart changes nothing.
		ok, err := t.intact()
		if ok && err == nil {
			break
		}
		return t.rewrite()
	case empty != !t.present:
		return t.rewrite()
	case empty:
		// Nothing is there, and nothing should be.
	default:
		if err := t.update(); err != nil {
			t.damage = err
			return t.rewrite()
		}
	}
	t.known, t.present = true, !empty
	t.forget()
	return nil
}

// Damaged returns why the last Commit wrote the whole table anew instead of what
// was different, or nil.
func (t *PolicyTable) Damaged() error { return t.damage }

// rewrite makes the table new, in one transaction.
func (t *PolicyTable) rewrite() error {
	tx, err := begin(t.name)
	if err != nil {
		return err
	}
	if len(t.subjects) == 0 {
		tx.remove()
	} else {
		tx.renew()
		for _, f := range []family{v4, v6} {
			for _, d := range []Direction{Egress, Ingress} {
				tx.addSet(subjectMap(d, f), nil)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(t.sets)) {
			s := t.sets[name]
			tx.addSet(s.ref(name), s.encode(slices.Collect(maps.Keys(s.elements))))
		}
		for _, c := range policyHooks() {
			tx.addChain(c)
			tx.addRules(c.name, c.rules)
		}
		for name := range t.chains {
			tx.addChain(chain{name: name})
		}
		for name, c := range t.chains {
			tx.addRules(name, t.render(c))
		}
		eachSubjectMap(t.subjects, tx.addElements)
	}
	if err := t.socket.commit(tx); err != nil {
		t.known = false
		return err
	}
	t.known, t.present = true, len(t.subjects) > 0
	t.forget()
	return nil
}

// RemovePolicyTable removes what an earlier process enforced on a node.
func RemovePolicyTable(node string) error {
	tx, err := begin(TableName(node, "policy"))
	if err != nil {
		return err
	}
	tx.remove()
	return tx.commit()
}

// update tells the kernel what is different from the last time. The order
// matters: what is named must exist before, and what is removed must not be
// named any more.
func (t *PolicyTable) update() error {
	tx, err := begin(t.name)
	if err != nil {
		return err
	}
	for name, existed := range t.oldSets {
		if s := t.sets[name]; s != nil && !existed {
			tx.addSet(s.ref(name), s.encode(slices.Collect(maps.Keys(s.elements))))
		}
	}
	for name, existed := range t.oldChains {
		if _, exists := t.chains[name]; exists && !existed {
			tx.addChain(chain{name: name})
		}
	}
	for name, existed := range t.oldChains {
		if c, exists := t.chains[name]; exists {
			if existed {
				tx.flushChain(name)
			}
			tx.addRules(name, t.render(c))
		}
	}
	t.updateElements(tx)
	t.updateSubjects(tx)
	gone := func(name string) bool { _, exists := t.chains[name]; return t.oldChains[name] && !exists }
	for name := range t.oldChains {
		if gone(name) {
			tx.flushChain(name) // all of them first: they may lead to each other
		}
	}
	for name := range t.oldChains {
		if gone(name) {
			tx.delChain(name)
		}
	}
	for name, existed := range t.oldSets {
		if existed && t.sets[name] == nil {
			tx.delSet(name)
		}
	}
	return t.socket.commit(tx)
}

func (t *PolicyTable) updateElements(tx *transaction) {
	for name, old := range t.oldElements {
		s := t.sets[name]
		if existed, touched := t.oldSets[name]; s == nil || touched && !existed {
			continue // removed, or added with all its elements
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
		tx.delElements(s.ref(name), s.encode(del))
		tx.addElements(s.ref(name), s.encode(add))
	}
}

func (t *PolicyTable) updateSubjects(tx *transaction) {
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
	eachSubjectMap(del, tx.delElements)
	eachSubjectMap(add, tx.addElements)
}

// eachSubjectMap sorts subjects into the maps.
func eachSubjectMap(subjects map[subject]string, do func(nftables.Set, []nftables.SetElement)) {
	type which struct {
		d  Direction
		v6 bool
	}
	elements := map[which][]nftables.SetElement{}
	for s, chain := range subjects {
		w := which{s.direction, s.addr.Is6()}
		elements[w] = append(elements[w], nftables.SetElement{Key: s.addr.AsSlice(), VerdictData: leadTo(chain)})
	}
	for w, e := range elements {
		do(subjectMap(w.d, familyFor(w.v6)), e)
	}
}

func leadTo(chain string) *expr.Verdict {
	if chain == Refuse {
		return &expr.Verdict{Kind: expr.VerdictDrop}
	}
	return &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}
}

// Hold refuses all connections of addresses of a new pod of which nothing is
// known yet, at once and without regard to what is staged. It is for the time
// before the first Commit: the rules of an earlier process go on deciding about
// all other pods. The caller stages the same for that Commit.
func (t *PolicyTable) Hold(addrs []netip.Addr) error {
	for _, a := range addrs {
		for _, d := range []Direction{Egress, Ingress} {
			if err := t.hold(map[subject]string{{d, a}: Refuse}); err != nil {
				return fmt.Errorf("refuse connections of new pod %s: %w", a, err)
			}
		}
	}
	return nil
}

func (t *PolicyTable) hold(one map[subject]string) error {
	try := func(steps ...func(*transaction)) error {
		tx, err := begin(t.name)
		if err != nil {
			return err
		}
		for _, step := range steps {
			step(tx)
		}
		return t.socket.commit(tx)
	}
	add := func(tx *transaction) { eachSubjectMap(one, tx.addElements) }
	del := func(tx *transaction) { eachSubjectMap(one, tx.delElements) }
	err := try(add)
	switch {
	case errors.Is(err, unix.EEXIST): // of an earlier owner of the address
		return try(del, add)
	case errors.Is(err, unix.ENOENT): // there is no table
		only := PolicyTable{name: t.name, subjects: one}
		return errors.Join(only.rewrite(), only.Close())
	}
	return err
}

// Close gives back what Commit keeps open. The table stays, and may be used again.
func (t *PolicyTable) Close() error { return t.socket.close() }

// Repair writes the table again when the kernel holds something else than the
// last Commit wrote, and says whether it had to.
func (t *PolicyTable) Repair() (bool, error) {
	if !t.known {
		return false, nil // the next Commit looks for itself
	}
	ok, err := t.intact()
	if ok && err == nil {
		return false, nil
	}
	// Unreadable is treated as damaged: writing does no harm.
	if err := t.rewrite(); err != nil {
		return false, fmt.Errorf("repair: %w", err)
	}
	return true, nil
}
