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

// Ruleset is the content that a table should have.
type Ruleset struct {
	Sets   []Set
	Chains []Chain
}

// Set is a set, or a map if IsMap.
type Set struct {
	Name        string
	Key, Data   nftables.SetDatatype
	IsMap       bool
	Ranges      bool   // elements are ranges of concatenated keys
	DynamicSize uint32 // maximum number of elements that packets add, each with a timeout; 0 for a static set
	Comment     string
	Elements    []nftables.SetElement
}

// In returns the set, without its elements, as the library's set of a table.
func (s Set) In(table *nftables.Table) *nftables.Set {
	return &nftables.Set{
		Table: table, Name: s.Name, KeyType: s.Key, DataType: s.Data, IsMap: s.IsMap, Comment: s.Comment,
		Interval: s.Ranges, Concatenation: s.Ranges,
		Dynamic: s.DynamicSize > 0, HasTimeout: s.DynamicSize > 0, Size: s.DynamicSize,
	}
}

// Chain is a chain that the kernel calls at Hook. Without a hook, other chains jump
// to it.
type Chain struct {
	Name     string
	Type     nftables.ChainType
	Hook     *nftables.ChainHook
	Priority *nftables.ChainPriority
	Rules    []Rule
}

// Add appends a rule that is made of parts.
func (c *Chain) Add(comment string, parts ...Exprs) {
	c.Rules = append(c.Rules, Rule{comment, Join(parts...)})
}

// Rule is a rule with its comment, which says to readers of the rules what it is for.
type Rule struct {
	Comment string
	Exprs   Exprs
}

// Replace gives the table exactly this content, in one transaction.
func (s *Socket) Replace(name string, rs Ruleset) error {
	t, err := Begin(name)
	if err != nil {
		return err
	}
	t.Recreate()
	for _, set := range rs.Sets {
		t.AddSet(*set.In(t.Table), set.Elements)
	}
	t.SetChains(rs.Chains)
	return s.Commit(t)
}

// Refill replaces the elements of sets of an existing table, in one transaction. Chains
// stay as they are.
func (s *Socket) Refill(name string, sets []Set) error {
	t, err := Begin(name)
	if err != nil {
		return err
	}
	for _, set := range sets {
		t.refill(set)
	}
	return s.Commit(t)
}

// Intact reports whether the table has the content rs: the same chains with the same number
// of rules under the same comments, and the same sets with the same elements.
func Intact(name string, rs Ruleset) (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	table, err := conn.ListTableOfFamily(name, nftables.TableFamilyINet)
	if err != nil {
		return false, IgnoreNotFound(err)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != name })
	if len(chains) != len(rs.Chains) {
		return false, nil
	}
	for _, c := range rs.Chains {
		rules, err := conn.GetRules(table, &nftables.Chain{Name: c.Name, Table: table})
		if err != nil {
			return false, IgnoreNotFound(err)
		}
		same := slices.EqualFunc(c.Rules, rules, func(want Rule, got *nftables.Rule) bool {
			comment, _ := userdata.GetString(got.UserData, userdata.TypeComment)
			return comment == want.Comment
		})
		if !same {
			return false, nil
		}
	}
	for _, s := range rs.Sets {
		got, err := conn.GetSetElements(s.In(table))
		if err != nil {
			return false, IgnoreNotFound(err)
		}
		if !sameElements(s.Elements, got) {
			return false, nil
		}
	}
	return true, nil
}

// IgnoreNotFound returns nil for the kernel's error about an object that does not exist.
func IgnoreNotFound(err error) error {
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
