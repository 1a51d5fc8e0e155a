// Package hostfirewall finds nftables chains of other programs that drop a packet. Kedge's own
// rules cannot override them: a packet that any chain drops is lost.
//
// The package evaluates the rules as the kernel would for a packet that opens a connection. A
// condition that it cannot evaluate (a limit, a mark, a named set) counts as not fulfilled, and
// results that may therefore be wrong are marked. Rules of iptables are covered if iptables
// uses nftables, as it does on all current distributions.
//
// The package changes nothing. Packages below network, and preflight, may import it.
package hostfirewall

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Hook is a hook of the kernel at which chains are evaluated.
type Hook uint32

// The hooks that filter, with the kernel's numbers.
const (
	Input   Hook = 1
	Forward Hook = 2
	Output  Hook = 3
)

func (h Hook) String() string {
	return map[Hook]string{Input: "input", Forward: "forward", Output: "output"}[h]
}

// Packet is the first packet of a connection. Unknown fields are zero.
type Packet struct {
	Hook     Hook
	In, Out  string // interfaces
	From, To netip.Addr
	Protocol uint8
	Port     uint16 // of the destination
}

// Drop is a chain that drops the packet.
type Drop struct {
	Family, Table, Chain string
	Hook                 Hook
	Policy               bool // dropped by the chain's policy, not by a rule
	Perhaps              bool // an earlier rule may accept the packet
	// Docker means that Docker has made the table. It has a chain for the rules of users, which Docker leaves alone.
	Docker bool
}

// dockerUser is the chain that Docker calls first for packets that are forwarded.
const dockerUser = "DOCKER-USER"

// String returns table and chain in nft's form.
func (d Drop) String() string {
	verb, by := "drops", "by a rule"
	if d.Perhaps {
		verb = "may drop"
	}
	if d.Policy {
		by = "by policy"
	}
	return fmt.Sprintf("chain %s of nftables table %s %s (hook %s) %s it %s", d.Chain, d.Family, d.Table, d.Hook, verb, by)
}

// Remedy says how the packets of a node's pods are let through. links is the prefix of the names of the pods' interfaces.
func (d Drop) Remedy(links string) string {
	if d.Docker && d.Hook == Forward {
		program := "iptables"
		if d.Family == "ip6" {
			program = "ip6tables"
		}
		return fmt.Sprintf("Docker drops what is not its own: %[1]s -I %[2]s -i %[3]s+ -j ACCEPT; %[1]s -I %[2]s -o %[3]s+ -j ACCEPT (until the next boot; docs/install.md has the lasting way)",
			program, dockerUser, links)
	}
	return fmt.Sprintf("let it accept packets that come in or go out by interfaces %s* (\"nft list chain %s %s %s\" shows the rules), or switch the firewall off", links, d.Family, d.Table, d.Chain)
}

// Drops returns the chains that drop a packet. Tables of kedge are left out.
func Drops(p Packet) ([]Drop, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	var found []Drop
	for _, c := range chains {
		if c.Hooknum == nil || Hook(*c.Hooknum) != p.Hook || c.Type != nftables.ChainTypeFilter || !sees(c.Table.Family, p) || strings.HasPrefix(c.Table.Name, "kedge-") {
			continue
		}
		w := walk{table: c.Table, packet: p, source: kernel{conn, chains}}
		end, err := w.chain(c.Name, 0)
		if err != nil {
			return nil, err
		}
		policy := end == none && c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
		if end == drop || policy {
			found = append(found, Drop{
				Family: familyName(c.Table.Family), Table: c.Table.Name, Chain: c.Name, Hook: p.Hook, Policy: policy, Perhaps: w.perhaps,
				Docker: slices.ContainsFunc(chains, func(o *nftables.Chain) bool {
					return o.Name == dockerUser && o.Table.Name == c.Table.Name && o.Table.Family == c.Table.Family
				}),
			})
		}
	}
	return found, nil
}

// OfPods returns packets that the pods of a node must be able to send: to each other, and to
// the resolver on the node. links is the prefix of their interfaces' names.
func OfPods(links string, pods []netip.Prefix, resolver []netip.Addr) []Packet {
	var packets []Packet
	end := func(c string) string { return links + strings.Repeat(c, max(unix.IFNAMSIZ-1-len(links), 0)) }
	for _, r := range pods {
		from := r.Addr().Next().Next()
		p := Packet{Hook: Forward, In: end("a"), Out: end("b"), From: from, To: from.Next(), Protocol: unix.IPPROTO_TCP}
		packets = append(packets, p)
		for _, a := range resolver {
			if a.Is4() == from.Is4() {
				packets = append(packets, Packet{Hook: Input, In: p.In, From: from, To: a, Protocol: unix.IPPROTO_UDP, Port: 53})
			}
		}
	}
	return packets
}

// Against returns the chains that drop any of the packets, each once.
func Against(packets []Packet) ([]Drop, error) {
	var all []Drop
	for _, p := range packets {
		drops, err := Drops(p)
		if err != nil {
			return nil, err
		}
		for _, d := range drops {
			if !slices.ContainsFunc(all, func(o Drop) bool { return o.Family == d.Family && o.Table == d.Table && o.Chain == d.Chain }) {
				all = append(all, d)
			}
		}
	}
	return all, nil
}

func sees(f nftables.TableFamily, p Packet) bool {
	switch f {
	case nftables.TableFamilyINet:
		return true
	case nftables.TableFamilyIPv4:
		return p.To.Is4()
	case nftables.TableFamilyIPv6:
		return p.To.Is6()
	}
	return false
}

func familyName(f nftables.TableFamily) string {
	return map[nftables.TableFamily]string{nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6"}[f]
}

// source is the source of rules.
type source interface {
	rules(table *nftables.Table, chain string) ([]*nftables.Rule, error)
	set(table *nftables.Table, name string) (*nftables.Set, []nftables.SetElement, error)
}

type kernel struct {
	conn   *nftables.Conn
	chains []*nftables.Chain
}

func (k kernel) rules(table *nftables.Table, chain string) ([]*nftables.Rule, error) {
	// Only for an existing chain: the kernel returns an error for others.
	if !slices.ContainsFunc(k.chains, func(c *nftables.Chain) bool {
		return c.Name == chain && c.Table.Name == table.Name && c.Table.Family == table.Family
	}) {
		return nil, nil
	}
	rules, err := k.conn.GetRules(table, &nftables.Chain{Name: chain, Table: table})
	if err != nil {
		return nil, fmt.Errorf("read chain %s of nftables table %s: %w", chain, table.Name, err)
	}
	return rules, nil
}

func (k kernel) set(table *nftables.Table, name string) (*nftables.Set, []nftables.SetElement, error) {
	s, err := k.conn.GetSetByName(table, name)
	if err != nil {
		return nil, nil, err
	}
	elements, err := k.conn.GetSetElements(s)
	return s, elements, err
}

// outcome is the result of a chain for a packet.
type outcome int

const (
	none   outcome = iota // the packet reaches the chain's end, or returns to the calling chain
	accept                // by this base chain; other base chains follow
	drop
)

// walk evaluates the chains of a table for a packet.
type walk struct {
	table   *nftables.Table
	packet  Packet
	source  source
	perhaps bool // a rule that could not be evaluated may have accepted
}

const maxDepth = 16 // of jumps, as in the kernel

func (w *walk) chain(name string, depth int) (outcome, error) {
	if depth > maxDepth {
		return none, nil
	}
	rules, err := w.source.rules(w.table, name)
	if err != nil {
		return none, err
	}
	for _, r := range rules {
		match, verdict, err := w.rule(r)
		if err != nil {
			return none, err
		}
		if match == no || verdict == nil {
			continue
		}
		var end outcome
		switch verdict.Kind {
		case expr.VerdictAccept:
			end = accept
		case expr.VerdictDrop:
			end = drop
		case expr.VerdictReturn:
			if match == yes {
				return none, nil
			}
		case expr.VerdictJump, expr.VerdictGoto:
			if end, err = w.chain(verdict.Chain, depth+1); err != nil {
				return none, err
			}
			if match == yes && verdict.Kind == expr.VerdictGoto {
				return end, nil
			}
		}
		switch {
		case end == none:
		case match == yes:
			return end, nil
		case end == accept:
			w.perhaps = true
		}
	}
	return none, nil
}
