package policies

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
)

// intact reports whether the kernel has the staged content: the same chains with rules
// under the same comments, and the same sets with the same elements.
func (t *Table) intact() (bool, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return false, fmt.Errorf("open nftables: %w", err)
	}
	defer conn.CloseLasting()
	table, err := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if errors.Is(err, unix.ENOENT) {
		return len(t.subjects) == 0, nil
	}
	if err != nil || len(t.subjects) == 0 {
		return false, err
	}
	for _, same := range []func(*nftables.Conn, *nftables.Table) (bool, error){t.sameChains, t.sameSets, t.sameSubjects} {
		if ok, err := same(conn, table); !ok {
			return false, nft.IgnoreNotFound(err)
		}
	}
	return true, nil
}

func (t *Table) sameChains(conn *nftables.Conn, _ *nftables.Table) (bool, error) {
	want := map[string][]nft.Rule{}
	for _, c := range hooks() {
		want[c.Name] = c.Rules
	}
	for name, c := range t.chains {
		want[name] = t.render(c)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, err
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != t.name })
	if len(chains) != len(want) {
		return false, nil
	}
	got, err := listRules(t.name)
	if err != nil {
		return false, err
	}
	for _, c := range chains {
		same := slices.EqualFunc(want[c.Name], got[c.Name], func(want nft.Rule, got listedRule) bool {
			return got.comment == nft.TrimComment(want.Comment) && got.length == len(want.Exprs)
		})
		if _, known := want[c.Name]; !known || !same {
			return false, nil
		}
	}
	return true, nil
}

func (t *Table) sameSets(conn *nftables.Conn, table *nftables.Table) (bool, error) {
	sets, err := conn.GetSets(table)
	if err != nil {
		return false, err
	}
	const fixed = 4 // the maps of subjects
	if len(sets) != len(t.sets)+fixed {
		return false, nil
	}
	for name, s := range t.sets {
		ref := s.ref(name)
		ref.Table = table
		got, err := conn.GetSetElements(&ref)
		if err != nil {
			return false, err
		}
		elements := s.decode(got)
		if len(elements) != len(s.elements) {
			return false, nil
		}
		for _, e := range elements {
			if s.elements[e] == 0 {
				return false, nil
			}
		}
	}
	return true, nil
}

func (t *Table) sameSubjects(conn *nftables.Conn, table *nftables.Table) (bool, error) {
	n := 0
	for _, f := range []nft.Family{nft.V4, nft.V6} {
		for _, d := range []Direction{Egress, Ingress} {
			m := subjectMap(d, f)
			m.Table = table
			got, err := conn.GetSetElements(&m)
			if err != nil {
				return false, err
			}
			n += len(got)
			for _, e := range got {
				addr, _ := netip.AddrFromSlice(e.Key)
				if chain, ok := chainFromVerdict(e.Val); !ok || t.subjects[subject{d, addr}] != chain {
					return false, nil
				}
			}
		}
	}
	return n == len(t.subjects), nil
}

// KernelVerdict returns the entry of an address in the kernel: the name of a chain,
// DenyAll, or the empty string.
func (t *Table) KernelVerdict(d Direction, a netip.Addr) (string, error) {
	conn, err := nftables.New()
	if err != nil {
		return "", fmt.Errorf("open nftables: %w", err)
	}
	table, err := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if err != nil {
		return "", nft.IgnoreNotFound(err)
	}
	m := subjectMap(d, nft.FamilyOf(a))
	m.Table = table
	got, err := conn.GetSetElements(&m)
	if err != nil {
		// The library's error hides that the table has just been removed.
		if _, gone := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet); errors.Is(gone, unix.ENOENT) {
			return "", nil
		}
		return "", err
	}
	for _, e := range got {
		if bytes.Equal(e.Key, a.AsSlice()) {
			chain, ok := chainFromVerdict(e.Val)
			if !ok {
				return "", fmt.Errorf("%s of %s: unknown verdict", d, a)
			}
			return chain, nil
		}
	}
	return "", nil
}

// KernelGeneration identifies the last rewrite of the whole table; partial changes do not
// alter it. It is zero while there is no table.
func (t *Table) KernelGeneration() (uint64, error) {
	rules, err := listRules(t.name)
	if err != nil || len(rules[chainEgress]) == 0 {
		return 0, nft.IgnoreNotFound(err)
	}
	return rules[chainEgress][0].handle, nil
}

// listedRule is a rule in the kernel.
type listedRule struct {
	comment string
	handle  uint64 // unique in the table and never reused
	length  int    // number of expressions
}

// listRules returns the rules of a table by chain, with one request. The library's reader
// requests one chain at a time, and cannot parse expressions about a direction of a
// connection.
func listRules(table string) (map[string][]listedRule, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	defer conn.Close()
	filter, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: append([]byte(table), 0)}})
	if err != nil {
		return nil, err
	}
	msgs, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, filter...), // struct nfgenmsg
	})
	if err != nil {
		return nil, fmt.Errorf("list rules: %w", err)
	}
	out := map[string][]listedRule{}
	for _, m := range msgs {
		attrs, err := nft.DecodeAttributes(m.Data[4:])
		if err != nil {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		var r listedRule
		r.comment, _ = userdata.GetString(attrs[unix.NFTA_RULE_USERDATA], userdata.TypeComment)
		r.handle = binary.BigEndian.Uint64(attrs[unix.NFTA_RULE_HANDLE])
		exprs, err := netlink.NewAttributeDecoder(attrs[unix.NFTA_RULE_EXPRESSIONS])
		if err != nil {
			return nil, fmt.Errorf("list rules: %w", err)
		}
		for exprs.Next() {
			r.length++
		}
		name := string(nft.TrimZero(attrs[unix.NFTA_RULE_CHAIN]))
		out[name] = append(out[name], r)
	}
	return out, nil
}
