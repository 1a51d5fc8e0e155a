package preflight

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/hostfirewall"
	"kedge/internal/namespaces"
)

// trialTimeout bounds the wait for an answer of the kernel.
const trialTimeout = 2 * time.Second

// inEmptyNetwork runs fn on a thread in an empty network namespace, which ends with the trial.
func inEmptyNetwork(fn func() error) error {
	ns, err := namespaces.NewNetwork()
	if err != nil {
		return err
	}
	defer ns.Close()
	return ns.Do(fn)
}

func tryLink(kind string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "trial"
	var link netlink.Link
	switch kind {
	case "veth":
		veth := netlink.NewVeth(attrs)
		veth.PeerName = "trial2"
		link = veth
	case "vxlan":
		link = &netlink.Vxlan{LinkAttrs: attrs, VxlanId: 1, Port: 8472, Learning: false}
	default:
		return fmt.Errorf("unknown kind of interface %q", kind)
	}
	return inEmptyNetwork(func() error { return netlink.LinkAdd(link) })
}

// nftFeature is a feature of nftables that kedge's rules use.
type nftFeature struct {
	name  string
	chain nftables.Chain // where the rule is tried
	exprs []expr.Any
	isMap bool // needs the map called "trial"
}

const trialName = "trial"

// nftFeatures lists the features in the rules of pods, services and policies.
func nftFeatures() []nftFeature {
	prerouting := nftables.Chain{Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest}
	postrouting := nftables.Chain{Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource}
	forward := nftables.Chain{Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter}
	raw := nftables.Chain{Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw}
	ipv4 := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
	}
	return []nftFeature{
		{name: "inet tables", chain: raw},
		{name: "destination translation by map", chain: prerouting, isMap: true, exprs: append(ipv4,
			&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4, DestRegister: 1},
			&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: trialName},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, Specified: true},
		)},
		{name: "masquerading", chain: postrouting, exprs: []expr.Any{&expr.Masq{FullyRandom: true}}},
		{name: "route look-ups (fib)", chain: raw, exprs: []expr.Any{
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		}},
		{name: "random numbers (numgen)", chain: forward, exprs: []expr.Any{
			&expr.Numgen{Register: 1, Modulus: 2, Type: unix.NFT_NG_RANDOM},
		}},
		{name: "hashing (jhash)", chain: forward, exprs: append(ipv4,
			&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4, DestRegister: 1},
			&expr.Hash{SourceRegister: 1, DestRegister: 2, Length: 4, Modulus: 2, Seed: 1, Type: expr.HashTypeJenkins},
		)},
		{name: "connection states (ct)", chain: forward, exprs: []expr.Any{
			&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		}},
		{name: "rejecting", chain: forward, exprs: []expr.Any{
			&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH},
		}},
	}
}

// tryNft loads a table with a rule that uses the feature.
func tryNft(f nftFeature) error {
	return inEmptyNetwork(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		table := conn.AddTable(&nftables.Table{Name: trialName, Family: nftables.TableFamilyINet})
		if f.isMap {
			err := conn.AddSet(&nftables.Set{
				Table: table, Name: trialName, ID: 1, IsMap: true,
				KeyType: nftables.TypeIPAddr, DataType: nftables.TypeIPAddr,
			}, []nftables.SetElement{{Key: net.IPv4(10, 0, 0, 1).To4(), Val: net.IPv4(10, 0, 0, 2).To4()}})
			if err != nil {
				return err
			}
		}
		f.chain.Name, f.chain.Table = trialName, table
		chain := conn.AddChain(&f.chain)
		if len(f.exprs) > 0 {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: f.exprs})
		}
		return conn.Flush()
	})
}

// tryConntrack requests the subsystem's statistics, because its table of connections may be
// large.
func tryConntrack() error {
	const getStatistics = unix.NFNL_SUBSYS_CTNETLINK<<8 | 4 // IPCTNL_MSG_CT_GET_STATS_CPU
	return inEmptyNetwork(func() error {
		conn, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(trialTimeout)); err != nil {
			return err
		}
		_, err = conn.Execute(mdnetlink.Message{
			Header: mdnetlink.Header{Type: getStatistics, Flags: mdnetlink.Request | mdnetlink.Dump},
			Data:   []byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0},
		})
		return err
	})
}

// dropsPods returns the chains of other programs that drop packets between pods or to the node.
func dropsPods(c Config) ([]hostfirewall.Drop, error) {
	return hostfirewall.Against(hostfirewall.OfPods(c.OwnLinks, c.PodRanges, c.DNS))
}

// route is a route of the machine.
type route struct {
	to   netip.Prefix
	link string // empty: none, packets are refused
	ours bool   // a kedge has made it
}

// Protocols of kedge's routes: of network/backend to other nodes, and of network/proxy and dns
// to services and the resolver.
const (
	networkProtocol = 213
	dnsProtocol     = 212
)

func readRoutes() ([]route, error) {
	all, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, err
	}
	names := map[int]string{}
	links, err := net.Interfaces()
	if err != nil {
		return nil, err
	}
	for _, l := range links {
		names[l.Index] = l.Name
	}
	var out []route
	for _, r := range all {
		if r.Dst == nil {
			continue
		}
		addr, ok := netip.AddrFromSlice(r.Dst.IP)
		if !ok {
			continue
		}
		bits, _ := r.Dst.Mask.Size()
		through := []int{r.LinkIndex}
		if len(r.MultiPath) > 0 { // each path has an interface of its own
			through = nil
			for _, path := range r.MultiPath {
				through = append(through, path.LinkIndex)
			}
		}
		for _, index := range through {
			ours := r.Protocol == networkProtocol || r.Protocol == dnsProtocol
			out = append(out, route{netip.PrefixFrom(addr.Unmap(), bits), names[index], ours})
		}
	}
	return out, nil
}

func defaultRoute() (bool, error) {
	for _, path := range []string{"/proc/net/route", "/proc/net/ipv6_route"} {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // without IPv6 there is no such file
		}
		if hasDefaultRoute(string(text)) {
			return true, nil
		}
	}
	return false, nil
}

// hasDefaultRoute reads the kernel's routing tables in either format: a line of
// IPv4 names interface, destination and gateway; one of IPv6 begins with
// destination and prefix length and ends with flags and interface.
func hasDefaultRoute(text string) bool {
	const reject = "lo"
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		switch {
		case len(f) == 11 && f[1] == "00000000" && f[7] == "00000000":
			return true
		case len(f) == 10 && strings.Trim(f[0], "0") == "" && f[1] == "00" && f[9] != reject:
			return true
		}
	}
	return false
}
