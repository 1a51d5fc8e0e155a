package nft

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
)

// intact says whether the kernel holds what is staged: the same chains with
// rules under the same comments, the same sets with the same elements.
func (t *PolicyTable) intact() (bool, error) {
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
			return false, absent(err)
		}
	}
	return true, nil
}

func (t *PolicyTable) sameChains(conn *nftables.Conn, _ *nftables.Table) (bool, error) {
	want := map[string][]commented{}
	for _, c := range policyHooks() {
		want[c.name] = c.rules
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
		same := slices.EqualFunc(want[c.Name], got[c.Name], func(want commented, got listedRule) bool {
			return got.comment == comment(want.comment) && got.length == len(want.rule)
		})
		if _, known := want[c.Name]; !known || !same {
			return false, nil
		}
	}
	return true, nil
}

func (t *PolicyTable) sameSets(conn *nftables.Conn, table *nftables.Table) (bool, error) {
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

func (t *PolicyTable) sameSubjects(conn *nftables.Conn, table *nftables.Table) (bool, error) {
	n := 0
	for _, f := range []family{v4, v6} {
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
				if chain, ok := chainOf(e.Val); !ok || t.subjects[subject{d, addr}] != chain {
					return false, nil
				}
			}
		}
	}
	return n == len(t.subjects), nil
}

// KernelVerdict returns what the kernel has for an address: the name of a chain,
// Refuse, or nothing.
func (t *PolicyTable) KernelVerdict(d Direction, a netip.Addr) (string, error) {
	conn, err := nftables.New()
	if err != nil {
		return "", fmt.Errorf("open nftables: %w", err)
	}
	table, err := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if err != nil {
		return "", absent(err)
	}
	m := subjectMap(d, familyOf(a))
	m.Table = table
	got, err := conn.GetSetElements(&m)
	if err != nil {
		// The library's error hides that the table has just gone.
		if _, gone := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet); errors.Is(gone, unix.ENOENT) {
			return "", nil
		}
		return "", err
	}
	for _, e := range got {
		if bytes.Equal(e.Key, a.AsSlice()) {
			chain, ok := chainOf(e.Val)
			if !ok {
				return "", fmt.Errorf("%s of %s: unknown verdict", d, a)
			}
			return chain, nil
		}
	}
	return "", nil
}

// KernelGeneration identifies a writing of the whole table; changes of parts of
// it leave it as it is. It is zero while there is no table.
func (t *PolicyTable) KernelGeneration() (uint64, error) {
	rules, err := listRules(t.name)
	if err != nil || len(rules[chainEgress]) == 0 {
		return 0, absent(err)
	}
	return rules[chainEgress][0].handle, nil
}

// listedRule is a rule as the kernel has it.
type listedRule struct {
	comment string
	handle  uint64 // unique in the table, not used twice
	length  int    // number of expressions
}

// listRules returns the rules of a table by chain, all of them with one request.
// The library's own reader asks for one chain at a time, and cannot read
// expressions about a direction of a connection.
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
		attrs, err := decodeAttributes(m.Data[4:])
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
		name := string(trimZero(attrs[unix.NFTA_RULE_CHAIN]))
		out[name] = append(out[name], r)
	}
	return out, nil
}

// decodeAttributes returns the attributes of a kernel message by their type.
func decodeAttributes(b []byte) (map[uint16][]byte, error) {
	d, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return nil, err
	}
	out := map[uint16][]byte{}
	for d.Next() {
		out[d.Type()] = d.Bytes()
	}
	return out, d.Err()
}

func trimZero(b []byte) []byte { return bytes.TrimRight(b, "\x00") }
