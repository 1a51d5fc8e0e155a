package services

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
)

// The designs that docs/decisions/service-rules.md compares: ours, and what
// kube-proxy's rules look like, with a chain for each service.

func benchPort(i, endpoints int) Port {
	p := Port{
		Name: "p", ClusterIP: netip.AddrFrom4([4]byte{10, 43, byte(i >> 8), byte(i)}),
		Protocol: unix.IPPROTO_UDP, Port: 80, Ready: true,
	}
	for n := range endpoints {
		p.Cluster = append(p.Cluster, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(i), byte(n + 1)}), 8080))
	}
	return p
}

type design interface {
	program(b *testing.B, services int)
	endpointChanges(b *testing.B, service, endpoints int) // how many it has afterwards
}

type ourDesign struct{ table *Table }

func (d *ourDesign) program(b *testing.B, services int) {
	cfg := sampleConfig()
	d.table = NewTable("node1", cfg)
	changes := map[string]Service{}
	for i := range services {
		changes[fmt.Sprint("default/s", i)] = Service{Ports: []Port{benchPort(i, 3)}}
	}
	if err := d.table.Apply(changes); err != nil {
		b.Fatal(err)
	}
}

func (d *ourDesign) endpointChanges(b *testing.B, i, endpoints int) {
	if err := d.table.Apply(map[string]Service{fmt.Sprint("default/s", i): {Ports: []Port{benchPort(i, endpoints)}}}); err != nil {
		b.Fatal(err)
	}
}

// chainDesign has a verdict map from addresses to chains, and in each chain a rule
// with a map of the endpoints.
type chainDesign struct {
	table *nftables.Table
	conn  *nftables.Conn
}

func (d *chainDesign) program(b *testing.B, services int) {
	conn, err := bulk(nftables.AsLasting())
	if err != nil {
		b.Fatal(err)
	}
	d.conn = conn
	d.table = &nftables.Table{Name: nft.TableName("node1", "services"), Family: nftables.TableFamilyINet}
	conn.AddTable(d.table)
	conn.DelTable(d.table)
	conn.AddTable(d.table)
	ips := &nftables.Set{Table: d.table, Name: "service-ips", ID: 1, IsMap: true, DataType: nftables.TypeVerdict,
		KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)}
	if err := conn.AddSet(ips, nil); err != nil {
		b.Fatal(err)
	}
	var elements []nftables.SetElement
	for i := range services {
		p := benchPort(i, 3)
		d.chain(b, conn, i, p)
		elements = append(elements, nftables.SetElement{Key: []byte(destination(p.clusterFrontend())), VerdictData: verdictGoto(fmt.Sprint("service-", i))})
	}
	for part := range slices.Chunk(elements, nft.ElementsPerMessage) {
		if err := conn.SetAddElements(ips, part); err != nil {
			b.Fatal(err)
		}
	}
	for _, hook := range []struct {
		name string
		hook *nftables.ChainHook
	}{{"prerouting", nftables.ChainHookPrerouting}, {"output", nftables.ChainHookOutput}} {
		c := conn.AddChain(&nftables.Chain{Name: hook.name, Table: d.table, Type: nftables.ChainTypeNAT, Hooknum: hook.hook, Priority: destinationPriority})
		conn.AddRule(&nftables.Rule{Table: d.table, Chain: c, Exprs: nft.Join(v4.Is(), v4.loadDestination(nft.Word0),
			nft.Exprs{&expr.Lookup{SourceRegister: nft.Word0, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: ips.Name, SetID: ips.ID}})})
	}
	if err := conn.Flush(); err != nil {
		b.Fatal(err)
	}
}

func (d *chainDesign) chain(b *testing.B, conn *nftables.Conn, i int, p Port) {
	c := conn.AddChain(&nftables.Chain{Name: fmt.Sprint("service-", i), Table: d.table})
	conn.FlushChain(c)
	m := &nftables.Set{Table: d.table, ID: uint32(i + 2), Name: "__map%d", Anonymous: true, Constant: true, IsMap: true, KeyType: nftables.TypeMark,
		DataType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)}
	var places []nftables.SetElement
	for n, e := range p.Cluster {
		places = append(places, nftables.SetElement{Key: []byte(number(uint32(n))), Val: []byte(addrPort(e))})
	}
	if err := conn.AddSet(m, places); err != nil {
		b.Fatal(err)
	}
	conn.AddRule(&nftables.Rule{Table: d.table, Chain: c, Exprs: nft.Join(
		nft.Exprs{nft.LoadProtocol(nft.Reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg1, Data: []byte{p.Protocol}}},
		nft.Exprs{
			&expr.Numgen{Register: nft.Reg1, Modulus: uint32(len(p.Cluster)), Type: unix.NFT_NG_RANDOM},
			&expr.Lookup{SourceRegister: nft.Reg1, DestRegister: nft.Word0, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		}, v4.send(nft.Word0))})
}

func (d *chainDesign) endpointChanges(b *testing.B, i, endpoints int) {
	conn := d.conn
	d.chain(b, conn, i, benchPort(i, endpoints))
	if err := conn.Flush(); err != nil {
		b.Fatal(err)
	}
}

func eachDesign(b *testing.B, f func(b *testing.B, d design)) {
	newTable(b, sampleConfig())
	b.Run("maps", func(b *testing.B) { f(b, &ourDesign{}) })
	b.Run("chains", func(b *testing.B) { f(b, &chainDesign{}) })
}

// BenchmarkServicesAll writes all services at once.
func BenchmarkServicesAll(b *testing.B) {
	for _, n := range []int{10, 1000, 5000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			eachDesign(b, func(b *testing.B, d design) {
				for b.Loop() {
					b.StopTimer()
					nft.RemoveTables("node1")
					b.StartTimer()
					d.program(b, n)
				}
			})
		})
	}
}

// BenchmarkServicesOneEndpoint gives one of many services an endpoint more or less.
func BenchmarkServicesOneEndpoint(b *testing.B) {
	for _, n := range []int{10, 1000, 5000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			eachDesign(b, func(b *testing.B, d design) {
				d.program(b, n)
				for i := 0; b.Loop(); i++ {
					d.endpointChanges(b, i/2%n, 2+i%2)
				}
			})
		})
	}
}

// BenchmarkServicesMovedEndpoint replaces an endpoint of one of many services.
func BenchmarkServicesMovedEndpoint(b *testing.B) {
	newTable(b, sampleConfig())
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d := &ourDesign{}
			d.program(b, n)
			for i := 0; b.Loop(); i++ {
				p := benchPort(i/2%n, 3)
				p.Cluster[1] = netip.AddrPortFrom(p.Cluster[1].Addr(), uint16(8080+i%2))
				if err := d.table.Apply(map[string]Service{fmt.Sprint("default/s", i/2%n): {Ports: []Port{p}}}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkServicesNewConnection sends the first packet of a connection to one of many
// services; "none" is the cost without services.
func BenchmarkServicesNewConnection(b *testing.B) {
	newTable(b, sampleConfig())
	if err := addrOnLoopback("10.43.0.0/16"); err != nil {
		b.Fatal(err)
	}
	b.Run("none", func(b *testing.B) { nft.RemoveTables("node1"); sendNew(b, 10) })
	for _, n := range []int{10, 1000, 5000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			eachDesign(b, func(b *testing.B, d design) {
				d.program(b, n)
				sendNew(b, n)
			})
		})
	}
}

// addrOnLoopback makes the kernel take a range for its own, so that packets to it
// can be sent whether they are translated or not.
func addrOnLoopback(prefix string) error {
	p := netip.MustParsePrefix(prefix)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.RouteReplace(&netlink.Route{LinkIndex: lo.Attrs().Index, Type: unix.RTN_LOCAL, Table: unix.RT_TABLE_LOCAL, Scope: netlink.SCOPE_HOST,
		Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}

// sendNew sends datagrams that are each the first of a flow.
func sendNew(b *testing.B, services int) {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_RAW)
	if err != nil {
		b.Fatal(err)
	}
	defer syscall.Close(fd)
	// The kernel must not answer each of them with an ICMP error.
	sink, err := net.ListenPacket("udp4", "0.0.0.0:8080")
	if err != nil {
		b.Fatal(err)
	}
	defer sink.Close()
	untranslated, err := net.ListenPacket("udp4", "0.0.0.0:80")
	if err != nil {
		b.Fatal(err)
	}
	defer untranslated.Close()
	packet := []byte{0x45, 0, 0, 29, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0, 127, 0, 0, 1, 10, 43, 0, 0, 0, 0, 0, 80, 0, 9, 0, 0, 'x'}
	to := &syscall.SockaddrInet4{}
	const flows = 100_000 // fewer than the kernel tracks
	for i := 0; b.Loop(); i++ {
		if i%flows == 0 {
			b.StopTimer()
			if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
		}
		service := i % services
		packet[18], packet[19] = byte(service>>8), byte(service)
		packet[14], packet[15] = byte(i/50_000), 1
		binary.BigEndian.PutUint16(packet[20:], uint16(1024+i%50_000))
		copy(to.Addr[:], packet[16:20])
		if err := syscall.Sendto(fd, packet, 0, to); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkServicesRepair compares the kernel with the wanted content, which happens every
// few minutes and after other programs have changed rules.
func BenchmarkServicesRepair(b *testing.B) {
	newTable(b, sampleConfig())
	for _, n := range []int{10, 1000, 10000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			d := &ourDesign{}
			d.program(b, n)
			for b.Loop() {
				if n, err := d.table.Repair(); n != 0 || err != nil {
					b.Fatal(n, err)
				}
			}
		})
	}
}

// bulk opens a connection whose transactions may be large.
func bulk(more ...nftables.ConnOption) (*nftables.Conn, error) {
	conn, err := nftables.New(append(more, nftables.WithSockOptions(func(c *mdnetlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(64<<20), c.SetReadBuffer(64<<20))
	}))...)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return conn, nil
}
