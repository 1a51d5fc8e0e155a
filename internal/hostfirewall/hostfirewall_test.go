package hostfirewall

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"kedge/internal/test/host"
)

var (
	pod1 = netip.MustParseAddr("10.42.0.5")
	pod2 = netip.MustParseAddr("10.42.0.6")
	// between is what one pod sends another.
	between = Packet{Hook: Forward, In: "kdgnodeaaaaaaaa", Out: "kdgnodebbbbbbbb", From: pod1, To: pod2, Protocol: unix.IPPROTO_TCP, Port: 8080}
)

func name(key expr.MetaKey, pattern string) []expr.Any {
	data := []byte(strings.TrimSuffix(pattern, "*"))
	if !strings.HasSuffix(pattern, "*") {
		data = append(data, make([]byte, unix.IFNAMSIZ-len(data))...)
	}
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}}
}

func in(pattern string) []expr.Any  { return name(expr.MetaKeyIIFNAME, pattern) }
func out(pattern string) []expr.Any { return name(expr.MetaKeyOIFNAME, pattern) }

func source24(network string) []expr.Any {
	a := netip.MustParseAddr(network).As4()
	return []expr.Any{
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 3, DestRegister: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a[:3]},
	}
}

func state(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func marked() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1, 0, 0, 0}}}
}

func xtState(bits uint16) []expr.Any {
	info := &xt.ConntrackMtinfo3{ConntrackMtinfo2: xt.ConntrackMtinfo2{
		ConntrackMtinfoBase: xt.ConntrackMtinfoBase{MatchFlags: uint16(xt.ConntrackState | xt.ConntrackStateAlias)}, StateMask: bits,
	}}
	return []expr.Any{&expr.Match{Name: "conntrack", Rev: 3, Info: info}}
}

func do(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }
func call(kind expr.VerdictKind, chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}
}

type rules [][]expr.Any

func rule(parts ...[]expr.Any) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return append(all[:len(all)-1:len(all)-1], &expr.Counter{}, all[len(all)-1])
}

func TestDrops(t *testing.T) {
	host.RequireIsolation(t)
	const accept, drop = expr.VerdictAccept, expr.VerdictDrop
	const by = "chain filter of nftables table ip host (hook forward) "
	for _, c := range []struct {
		what   string
		policy nftables.ChainPolicy
		rules  rules
		sub    rules
		packet Packet
		want   string
	}{
		{"accepts", nftables.ChainPolicyAccept, nil, nil, between, ""},
		{"policy", nftables.ChainPolicyDrop, nil, nil, between, by + "drops it by policy"},
		{"another hook", nftables.ChainPolicyDrop, nil, nil, Packet{Hook: Input, To: pod1}, ""},
		{"IPv6 is another table's", nftables.ChainPolicyDrop, nil, nil, Packet{Hook: Forward, To: netip.MustParseAddr("fd42::5")}, ""},
		{"pods are accepted", nftables.ChainPolicyDrop, rules{rule(in("kdg*"), do(accept))}, nil, between, ""},
		{"the other way only", nftables.ChainPolicyDrop, rules{rule(in("kdg*"), out("eth0"), do(accept))}, nil, between, by + "drops it by policy"},
		{"by range", nftables.ChainPolicyDrop, rules{rule(source24("10.42.0.0"), do(accept))}, nil, between, ""},
		{"by another range", nftables.ChainPolicyDrop, rules{rule(source24("10.44.0.0"), do(accept))}, nil, between, by + "drops it by policy"},
		{"established only", nftables.ChainPolicyDrop, rules{rule(state(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), do(accept))}, nil, between, by + "drops it by policy"},
		{"new ones too", nftables.ChainPolicyDrop, rules{rule(state(expr.CtStateBitNEW), do(accept))}, nil, between, ""},
		{"iptables, established", nftables.ChainPolicyDrop, rules{rule(xtState(2|4), do(accept))}, nil, between, by + "drops it by policy"},
		{"iptables, new", nftables.ChainPolicyDrop, rules{rule(xtState(8), do(accept))}, nil, between, ""},
		{"marked ones", nftables.ChainPolicyDrop, rules{rule(marked(), do(accept))}, nil, between, by + "may drop it by policy"},
		{"drops marked ones", nftables.ChainPolicyAccept, rules{rule(marked(), do(drop))}, nil, between, ""},
		{"a rule", nftables.ChainPolicyAccept, rules{rule(out("kdg*"), do(drop))}, nil, between, by + "drops it by a rule"},
		{"invalid ones", nftables.ChainPolicyAccept, rules{rule(state(expr.CtStateBitINVALID), do(drop))}, nil, between, ""},
		{"refused", nftables.ChainPolicyAccept, rules{{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}}, nil, between, by + "drops it by a rule"},
		{"accepted by a chain", nftables.ChainPolicyDrop, rules{rule(in("kdg*"), call(expr.VerdictJump, "sub"))}, rules{rule(do(accept))}, between, ""},
		{"back from a chain", nftables.ChainPolicyDrop, rules{rule(in("kdg*"), call(expr.VerdictJump, "sub")), rule(out("kdg*"), do(accept))}, rules{rule(do(expr.VerdictReturn)), rule(do(drop))}, between, ""},
		{"gone for ever", nftables.ChainPolicyDrop, rules{rule(in("kdg*"), call(expr.VerdictGoto, "sub")), rule(out("kdg*"), do(accept))}, nil, between, by + "drops it by policy"},
		{"perhaps by a chain", nftables.ChainPolicyDrop, rules{rule(marked(), call(expr.VerdictJump, "sub"))}, rules{rule(do(accept))}, between, by + "may drop it by policy"},
	} {
		t.Run(c.what, func(t *testing.T) {
			conn, err := nftables.New()
			if err != nil {
				t.Fatal(err)
			}
			table := conn.AddTable(&nftables.Table{Name: "host", Family: nftables.TableFamilyIPv4})
			t.Cleanup(func() {
				conn.DelTable(table)
				if err := conn.Flush(); err != nil {
					t.Error(err)
				}
			})
			sub := conn.AddChain(&nftables.Chain{Name: "sub", Table: table})
			base := conn.AddChain(&nftables.Chain{
				Name: "filter", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
				Priority: nftables.ChainPriorityFilter, Policy: &c.policy,
			})
			for _, r := range c.sub {
				conn.AddRule(&nftables.Rule{Table: table, Chain: sub, Exprs: r})
			}
			for _, r := range c.rules {
				conn.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: r})
			}
			if err := conn.Flush(); err != nil {
				t.Skipf("this kernel lacks what the rule needs: %v", err)
			}
			drops, err := Drops(c.packet)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, d := range drops {
				got = append(got, d.String())
			}
			if strings.Join(got, "; ") != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
			if len(drops) == 0 {
				return
			}
			if got := drops[0].Remedy("kdg1"); !strings.Contains(got, `by interfaces kdg1* ("nft list chain ip host filter" shows`) {
				t.Errorf("the remedy is %q", got)
			}
			conn.AddChain(&nftables.Chain{Name: "DOCKER-USER", Table: table})
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
			if drops, err := Drops(c.packet); err != nil || len(drops) != 1 || !strings.Contains(drops[0].Remedy("kdg1"), ": iptables -I DOCKER-USER -i kdg1+ -j ACCEPT; iptables -I DOCKER-USER -o kdg1+ -j ACCEPT") {
				t.Errorf("with Docker: %v, %v", drops, err)
			}
		})
	}
}

// TestSets: sets that a rule has written down itself are looked into.
func TestSets(t *testing.T) {
	host.RequireIsolation(t)
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: "host", Family: nftables.TableFamilyINet})
	defer func() {
		conn.DelTable(table)
		if err := conn.Flush(); err != nil {
			t.Error(err)
		}
	}()
	policy := nftables.ChainPolicyDrop
	base := conn.AddChain(&nftables.Chain{
		Name: "filter", Table: table, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward,
		Priority: nftables.ChainPriorityFilter, Policy: &policy,
	})
	ports := &nftables.Set{Table: table, Anonymous: true, Constant: true, KeyType: nftables.TypeInetService}
	port := func(p uint16) nftables.SetElement { return nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(p)} }
	if err := conn.AddSet(ports, []nftables.SetElement{port(80), port(8080)}); err != nil {
		t.Fatal(err)
	}
	ranges := &nftables.Set{Table: table, Anonymous: true, Constant: true, Interval: true, KeyType: nftables.TypeIPAddr}
	border := func(a string, end bool) nftables.SetElement {
		return nftables.SetElement{Key: netip.MustParseAddr(a).AsSlice(), IntervalEnd: end}
	}
	if err := conn.AddSet(ranges, []nftables.SetElement{border("0.0.0.0", true), border("10.42.0.4", false), border("10.42.0.6", true)}); err != nil {
		t.Fatal(err)
	}
	conn.AddRule(&nftables.Rule{Table: table, Chain: base, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4, DestRegister: 1},
		&expr.Lookup{SourceRegister: 1, SetName: ranges.Name, SetID: ranges.ID},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: 1},
		&expr.Lookup{SourceRegister: 1, SetName: ports.Name, SetID: ports.ID},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*Packet)) Packet {
		p := between
		change(&p)
		return p
	}
	for _, c := range []struct {
		what   string
		packet Packet
		want   string
	}{
		{"accepted", between, ""},
		{"another port", with(func(p *Packet) { p.Port = 81 }), "drops"},
		{"unknown port", with(func(p *Packet) { p.Port = 0 }), "may drop"},
		{"UDP", with(func(p *Packet) { p.Protocol = unix.IPPROTO_UDP }), "drops"},
		{"after the range", with(func(p *Packet) { p.From = netip.MustParseAddr("10.42.0.6") }), "drops"},
		{"before the range", with(func(p *Packet) { p.From = netip.MustParseAddr("10.42.0.3") }), "drops"},
		{"IPv6", with(func(p *Packet) { p.To = netip.MustParseAddr("fd42::5") }), "drops"},
	} {
		drops, err := Drops(c.packet)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, d := range drops {
			got = d.String()
		}
		if c.want == "" && got != "" || c.want != "" && !strings.Contains(got, ") "+c.want) {
			t.Errorf("%s: %q, want %q", c.what, got, c.want)
		}
	}
}
