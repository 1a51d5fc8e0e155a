package nft

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
)

// synchronize brings the kernel from whatever it has to what is wanted, and
// returns how much differed. Sets are compared element by element: connections
// go on, and what clients of services with session affinity had stays.
func (t *ServiceTable) synchronize() (int, error) {
	d, err := t.compare()
	switch {
	case errors.Is(err, errOtherShape):
		d, err = t.replace()
	case err == nil:
		err = t.write(d)
	}
	if err != nil {
		t.inStep = false
		return 0, err
	}
	t.inStep, t.adopted = true, true
	return d.size(), nil
}

// errOtherShape says that the table is not there or was not written by this version.
var errOtherShape = errors.New("nftables table is missing or has another shape")

// compare returns what the kernel lacks and has too much.
func (t *ServiceTable) compare() (delta, error) {
	var d delta
	conn, err := nftables.New()
	if err != nil {
		return d, fmt.Errorf("open nftables: %w", err)
	}
	table, err := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if err != nil {
		return d, errors.Join(absent(err), errOtherShape)
	}
	if err := t.sameSets(conn, table); err != nil {
		return d, err
	}
	have := map[ref]bool{}
	for id := range allSets {
		if id.kind == kindClients {
			continue // packets change it
		}
		got, err := conn.GetSetElements(id.describe().of(table))
		if err != nil {
			return d, fmt.Errorf("read set %s: %w", id.name(), err)
		}
		for _, g := range got {
			e := id.from(g)
			w, ok := t.want[e.ref]
			if ok && w.val == e.val {
				have[e.ref] = true
			} else {
				d.remove = append(d.remove, e)
			}
		}
	}
	for r, w := range t.want {
		if !have[r] && r.set.kind != kindChains {
			d.add = append(d.add, element{r, w.val})
		}
	}
	d.chains, err = t.wrongChains(conn)
	return d, err
}

func allSets(yield func(setID) bool) {
	for k := range setKinds {
		for _, f := range []family{v4, v6} {
			if !yield(f.set(k)) {
				return
			}
		}
	}
}

// sameSets says whether the table has our sets with keys and values as ours.
func (t *ServiceTable) sameSets(conn *nftables.Conn, table *nftables.Table) error {
	list, err := conn.GetSets(table)
	if err != nil {
		return fmt.Errorf("list sets: %w", err)
	}
	have := map[string]*nftables.Set{}
	for _, s := range list {
		have[s.Name] = s
	}
	for id := range allSets {
		want, got := id.describe(), have[id.name()]
		if got == nil || got.IsMap != want.isMap {
			return errOtherShape
		}
		if id.kind.hasVerdicts() {
			continue // of a map of verdicts the library tells no lengths
		}
		if got.KeyType.Bytes != want.key.Bytes || got.DataType.Bytes != want.data.Bytes {
			return errOtherShape
		}
	}
	return nil
}

// wantedChains are all chains that the table should have.
func (t *ServiceTable) wantedChains() []chain {
	list := t.cfg.chains()
	for r := range t.want {
		if r.set.kind == kindChains {
			list = append(list, t.chains[r.key])
		}
	}
	return list
}

// wrongChains returns the chains whose rules differ; all of them if they are
// another process's. A foreign chain, or one with another hook, is another shape.
func (t *ServiceTable) wrongChains(conn *nftables.Conn) ([]chain, error) {
	all, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("list chains: %w", err)
	}
	have := map[string]*nftables.Chain{}
	for _, c := range all {
		if c.Table.Name == t.name {
			have[c.Name] = c
		}
	}
	rules, err := comments(t.name)
	if err != nil {
		return nil, err
	}
	var wrong []chain
	for _, c := range t.wantedChains() {
		got := have[c.name]
		delete(have, c.name)
		if c.hook != nil && (got == nil || got.Hooknum == nil || *got.Hooknum != *c.hook || got.Priority == nil || *got.Priority != *c.priority) {
			return nil, errOtherShape
		}
		if got == nil || !t.adopted || !c.has(rules[c.name]) {
			wrong = append(wrong, c)
		}
	}
	for name, c := range have { // of classes that a process before used
		if c.Hooknum != nil {
			return nil, errOtherShape
		}
		if _, known := t.unused[name]; !known {
			t.unused[name] = t.now()
		}
	}
	return wrong, nil
}

// replace writes the whole table in one transaction.
func (t *ServiceTable) replace() (delta, error) {
	tx, err := begin(t.name)
	if err != nil {
		return delta{}, err
	}
	tx.renew()
	for id := range allSets {
		tx.addSet(*id.describe().of(tx.table), nil)
	}
	d := delta{chains: t.wantedChains()}
	tx.setChains(d.chains)
	for r, w := range t.want {
		if r.set.kind != kindChains {
			d.add = append(d.add, element{r, w.val})
		}
	}
	queue(d.add, tx.addElements)
	if err := t.socket.commit(tx); err != nil {
		return delta{}, err
	}
	clear(t.unused)
	return d, nil
}
