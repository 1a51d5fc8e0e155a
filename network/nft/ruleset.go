package nft

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// ruleset is everything a table should hold.
type ruleset struct {
	sets   []set
	chains []chain
}

// set is a set, or a map where data is given.
type set struct {
	name      string
	key, data nftables.SetDatatype
	isMap     bool
	ranges    bool   // elements are ranges of concatenated keys
	grows     uint32 // how many elements packets may add, each with a timeout; 0 for a set that only we change
	comment   string
	elements  []nftables.SetElement
}

// of is the set as a part of a table, as the library wants it.
func (s set) of(table *nftables.Table) *nftables.Set {
	return &nftables.Set{
		Table: table, Name: s.name, KeyType: s.key, DataType: s.data, IsMap: s.isMap, Comment: s.comment,
		Interval: s.ranges, Concatenation: s.ranges,
		Dynamic: s.grows > 0, HasTimeout: s.grows > 0, Size: s.grows,
	}
}

// chain is called by the kernel at hook, or by other chains where hook is nil.
type chain struct {
	name     string
	kind     nftables.ChainType
	hook     *nftables.ChainHook
	priority *nftables.ChainPriority
	rules    []commented
}

// commented is a rule and what it is for, as a reader of the rules sees it.
type commented struct {
	comment string
	rule    rule
}

// replace makes the table hold exactly rs, in one transaction.
func (s *socket) replace(name string, rs ruleset) error {
	t, err := begin(name)
	if err != nil {
		return err
	}
	t.renew()
	for _, set := range rs.sets {
		t.addSet(*set.of(t.table), set.elements)
	}
	t.setChains(rs.chains)
	return s.commit(t)
}

// refill makes the sets of an existing table hold just the given elements, in
// one transaction. Chains stay as they are.
func (s *socket) refill(name string, sets []set) error {
	t, err := begin(name)
	if err != nil {
		return err
	}
	for _, set := range sets {
		t.refill(set)
	}
	return s.commit(t)
}

// intact says whether the table holds what rs says: the same chains with as
// many rules under the same comments, the same sets with the same elements.
func intact(name string, rs ruleset) (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	table, err := conn.ListTableOfFamily(name, nftables.TableFamilyINet)
	if err != nil {
		return false, absent(err)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != name })
	if len(chains) != len(rs.chains) {
		return false, nil
	}
	for _, c := range rs.chains {
		rules, err := conn.GetRules(table, &nftables.Chain{Name: c.name, Table: table})
		if err != nil {
			return false, absent(err)
		}
		same := slices.EqualFunc(c.rules, rules, func(want commented, got *nftables.Rule) bool {
			comment, _ := userdata.GetString(got.UserData, userdata.TypeComment)
			return comment == want.comment
		})
		if !same {
			return false, nil
		}
	}
	for _, s := range rs.sets {
		got, err := conn.GetSetElements(s.of(table))
		if err != nil {
			return false, absent(err)
		}
		if !sameElements(s.elements, got) {
			return false, nil
		}
	}
	return true, nil
}

// absent turns the kernel's answer for what does not exist into no error.
func absent(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func sameElements(a, b []nftables.SetElement) bool {
	order := func(x, y nftables.SetElement) int { return bytes.Compare(x.Key, y.Key) }
	a, b = slices.SortedFunc(slices.Values(a), order), slices.SortedFunc(slices.Values(b), order)
	return slices.EqualFunc(a, b, func(x, y nftables.SetElement) bool {
		return bytes.Equal(x.Key, y.Key) && bytes.Equal(x.Val, y.Val)
	})
}
