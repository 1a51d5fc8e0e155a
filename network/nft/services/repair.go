package services

import (
	"errors"
	"fmt"

	"github.com/google/nftables"

	"kedge/network/nft"
)

// synchronize brings the kernel from any state to the wanted one, and returns the number of
// differences. Sets are compared element by element: connections continue, and the
// remembered clients of services with session affinity stay.
func (t *Table) synchronize() (int, error) {
	d, err := t.compare()
	switch {
	case errors.Is(err, errSchemaMismatch):
		d, err = t.replace()
	case err == nil:
		err = t.write(d)
	}
	if err != nil {
		t.synced = false
		return 0, err
	}
	t.synced, t.adopted = true, true
	return d.size(), nil
}

// errSchemaMismatch is the error for a table that does not exist or was written by another
// version.
var errSchemaMismatch = errors.New("nftables table is missing or was written by another version")

// compare returns the elements and chains that the kernel lacks or has in excess.
func (t *Table) compare() (delta, error) {
	var d delta
	conn, err := nftables.New()
	if err != nil {
		return d, fmt.Errorf("open nftables: %w", err)
	}
	table, err := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if err != nil {
		return d, errors.Join(nft.IgnoreNotFound(err), errSchemaMismatch)
	}
	if err := t.sameSets(conn, table); err != nil {
		return d, err
	}
	have := map[ref]bool{}
	for id := range allSets {
		if id.kind == kindClients {
			continue // packets change this set
		}
		got, err := conn.GetSetElements(id.describe().In(table))
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

// sameSets returns an error unless the table has the sets of this version, with the same
// key and value types.
func (t *Table) sameSets(conn *nftables.Conn, table *nftables.Table) error {
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
		if got == nil || got.IsMap != want.IsMap {
			return errSchemaMismatch
		}
		if id.kind.hasVerdicts() {
			continue // the library returns no lengths for maps of verdicts
		}
		if got.KeyType.Bytes != want.Key.Bytes || got.DataType.Bytes != want.Data.Bytes {
			return errSchemaMismatch
		}
	}
	return nil
}

// wantedChains returns all chains of the wanted table.
func (t *Table) wantedChains() []nft.Chain {
	list := t.cfg.chains()
	for r := range t.want {
		if r.set.kind == kindChains {
			list = append(list, t.chains[r.key])
		}
	}
	return list
}

// wrongChains returns the chains whose rules differ; all chains, if another process wrote
// them. A foreign base chain, or one with another hook, is a schema mismatch.
func (t *Table) wrongChains(conn *nftables.Conn) ([]nft.Chain, error) {
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
	rules, err := nft.Comments(t.name)
	if err != nil {
		return nil, err
	}
	var wrong []nft.Chain
	for _, c := range t.wantedChains() {
		got := have[c.Name]
		delete(have, c.Name)
		if c.Hook != nil && (got == nil || got.Hooknum == nil || *got.Hooknum != *c.Hook || got.Priority == nil || *got.Priority != *c.Priority) {
			return nil, errSchemaMismatch
		}
		if got == nil || !t.adopted || !c.HasComments(rules[c.Name]) {
			wrong = append(wrong, c)
		}
	}
	for name, c := range have { // chains of classes that an earlier process used
		if c.Hooknum != nil {
			return nil, errSchemaMismatch
		}
		if _, known := t.unused[name]; !known {
			t.unused[name] = t.now()
		}
	}
	return wrong, nil
}

// replace writes the whole table in one transaction.
func (t *Table) replace() (delta, error) {
	tx, err := nft.Begin(t.name)
	if err != nil {
		return delta{}, err
	}
	tx.Recreate()
	for id := range allSets {
		tx.AddSet(*id.describe().In(tx.Table), nil)
	}
	d := delta{chains: t.wantedChains()}
	tx.SetChains(d.chains)
	for r, w := range t.want {
		if r.set.kind != kindChains {
			d.add = append(d.add, element{r, w.val})
		}
	}
	forEachSet(d.add, tx.AddElements)
	if err := t.socket.Commit(tx); err != nil {
		return delta{}, err
	}
	clear(t.unused)
	return d, nil
}
