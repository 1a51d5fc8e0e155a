package harness

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/nftables"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
)

// LANNode is a dual-stack node on a machine of its own, and another machine on the
// same switch, which is its default route too.
type LANNode struct {
	*Node
	outside *host.Host // the other machine
}

// Addresses of the two machines.
var (
	LANNodeV4    = netip.MustParsePrefix("198.51.100.10/24")
	LANNodeV6    = netip.MustParsePrefix("2001:db8:51::10/64")
	LANOutsideV4 = netip.MustParsePrefix("198.51.100.20/24")
	LANOutsideV6 = netip.MustParsePrefix("2001:db8:51::20/64")
)

// OnLAN starts such a node with all that a node of [Own] has.
func OnLAN(t *testing.T, flags ...string) *LANNode {
	t.Helper()
	lan, err := host.NewLAN()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lan.Close(); err != nil {
			t.Error(err)
		}
	})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	machine, err := lan.Host("machine", LANNodeV4, LANNodeV6)
	must(err)
	outside, err := lan.Host("outside", LANOutsideV4, LANOutsideV6)
	must(err)
	for _, h := range []struct {
		host *host.Host
		v4   netip.Prefix
		v6   netip.Prefix
	}{{machine, LANOutsideV4, LANOutsideV6}, {outside, LANNodeV4, LANNodeV6}} {
		must(h.host.Route(netip.MustParsePrefix("0.0.0.0/0"), h.v4.Addr()))
		must(h.host.Route(netip.MustParsePrefix("::/0"), h.v6.Addr()))
	}
	n := Own(t, append([]string{
		"--cluster-cidr=10.42.0.0/16,fd42::/56", "--service-cidr=10.43.0.0/16,fd43::/112",
		fmt.Sprintf("--node-ip=%s,%s", LANNodeV4.Addr(), LANNodeV6.Addr()),
	}, flags...)...)
	n.Flags = n.Flags[2:] // not the ranges that Own has chosen
	n.Network, err = namespaces.OpenNetwork(machine.Path())
	must(err)
	must(PrepareImages(n.DataDir()))
	must(n.Start())
	return &LANNode{n, outside}
}

// GetOutside asks from the other machine.
func (n *LANNode) GetOutside(url string, timeout time.Duration) (string, error) {
	return get(url, timeout, n.outside.Dial)
}

// SeenAddress is the address that "/addr" answers, without the port.
func SeenAddress(answer string) string {
	host, _, err := net.SplitHostPort(answer)
	if err != nil {
		return answer
	}
	return host
}

// HostTable checks that a table of the host's is still there.
func (n *Node) HostTable(t *testing.T, name string) {
	t.Helper()
	err := n.Inside(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		_, err = conn.ListTableOfFamily(name, nftables.TableFamilyINet)
		return err
	})
	if err != nil {
		t.Errorf("table %s of the host: %v", name, err)
	}
}

// Trace explains a connection.
func (n *Node) Trace(namespace string, args ...string) (string, error) {
	return n.Run(append([]string{"net", "trace", "--run-dir=" + n.RunDir(), "--namespace=" + namespace}, args...)...)
}
