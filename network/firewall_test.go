package network

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"kedge/network/cni"
	"kedge/network/trace"
)

// TestHostFirewall: a firewall that separates pods from each other or from their resolver
// is reported, and a firewall that accepts their packets is not.
func TestHostFirewall(t *testing.T) {
	for _, c := range []struct {
		hook   *nftables.ChainHook
		to     string // of the traced connection
		reason string
	}{
		{nftables.ChainHookForward, "10.42.0.9:80", "chain block of nftables table inet host (hook forward) drops it by policy"},
		{nftables.ChainHookInput, "10.43.0.10:53", "chain block of nftables table inet host (hook input) drops it by policy"},
	} {
		t.Run(c.to, func(t *testing.T) {
			w := newWorld(t, podsV4)
			w.stop()
			w.cfg.Resolver = []netip.Addr{netip.MustParseAddr("10.43.0.10")}
			w.start()
			conn, err := nftables.New()
			w.must(err)
			policy := nftables.ChainPolicyDrop
			table := conn.AddTable(&nftables.Table{Name: "host", Family: nftables.TableFamilyINet})
			chain := conn.AddChain(&nftables.Chain{
				Name: "block", Table: table, Type: nftables.ChainTypeFilter, Hooknum: c.hook,
				Priority: nftables.ChainPriorityFilter, Policy: &policy,
			})
			w.must(w.network.Check(t.Context()))
			w.must(conn.Flush())
			if err := w.network.Check(t.Context()); err == nil || !strings.Contains(err.Error(), c.reason) {
				t.Errorf("Check: %v, want %q", err, c.reason)
			}
			traced := func() (trace.Packet, []trace.Step) {
				p := trace.Packet{Protocol: unix.IPPROTO_UDP,
					From: trace.End{Addr: netip.MustParseAddrPort("10.42.0.5:1000")}, To: trace.End{Addr: netip.MustParseAddrPort(c.to)}}
				resolve := func(a netip.Addr) (trace.Place, string) {
					if podsV4.Contains(a) {
						return trace.Pod, "default/" + a.String()
					}
					return trace.Node, ""
				}
				steps, err := trace.Run(t.Context(), []trace.Part{w.network.Rules(), w.network.Firewall()}, resolve, &p)
				w.must(err)
				return p, steps
			}
			if p, steps := traced(); !p.Ended || len(steps) != 1 || steps[0].Table != "inet host" || steps[0].Chain != "block" {
				t.Errorf("traced: %v", steps)
			}
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
				&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(cni.LinkTag)},
				&expr.Verdict{Kind: expr.VerdictAccept},
			}})
			w.must(conn.Flush())
			if err := w.network.Check(t.Context()); err != nil {
				t.Errorf("Check, with pods accepted: %v", err)
			}
			if p, steps := traced(); p.Ended || len(steps) != 0 {
				t.Errorf("traced, with pods accepted: %v", steps)
			}
			conn.DelTable(table)
			w.must(conn.Flush())
		})
	}
}
