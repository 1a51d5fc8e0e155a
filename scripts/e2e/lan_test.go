package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/nftables"

	"kedge/internal/netns"
	"kedge/internal/testhost"
)

// lanNode is a dual-stack node on a machine of its own, and another machine on the
// same switch, which is its default route too.
type lanNode struct {
	*node
	outside *testhost.Host
}

var (
	lanNodeV4    = netip.MustParsePrefix("198.51.100.10/24")
	lanNodeV6    = netip.MustParsePrefix("2001:db8:51::10/64")
	lanOutsideV4 = netip.MustParsePrefix("198.51.100.20/24")
	lanOutsideV6 = netip.MustParsePrefix("2001:db8:51::20/64")
)

// onLAN starts one with all that an own node has.
func onLAN(t *testing.T, flags ...string) *lanNode {
	t.Helper()
	lan, err := testhost.NewLAN()
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
	machine, err := lan.Host("machine", lanNodeV4, lanNodeV6)
	must(err)
	outside, err := lan.Host("outside", lanOutsideV4, lanOutsideV6)
	must(err)
	for _, h := range []struct {
		host *testhost.Host
		v4   netip.Prefix
		v6   netip.Prefix
	}{{machine, lanOutsideV4, lanOutsideV6}, {outside, lanNodeV4, lanNodeV6}} {
		must(h.host.Route(netip.MustParsePrefix("0.0.0.0/0"), h.v4.Addr()))
		must(h.host.Route(netip.MustParsePrefix("::/0"), h.v6.Addr()))
	}
	n := own(t, append([]string{
		"--cluster-cidr=10.42.0.0/16,fd42::/56", "--service-cidr=10.43.0.0/16,fd43::/112",
		fmt.Sprintf("--node-ip=%s,%s", lanNodeV4.Addr(), lanNodeV6.Addr()),
	}, flags...)...)
	n.flags = n.flags[2:] // not the ranges that own has chosen
	n.network, err = netns.Open(machine.Path())
	must(err)
	must(prepareImages(n.dataDir()))
	must(n.start())
	return &lanNode{n, outside}
}

// getOutside asks from the other machine.
func (n *lanNode) getOutside(url string, timeout time.Duration) (string, error) {
	return get(url, timeout, n.outside.Dial)
}

// seen is the address that "/addr" answers, without the port.
func seen(answer string) string {
	host, _, err := net.SplitHostPort(answer)
	if err != nil {
		return answer
	}
	return host
}

// hostTable checks that a table of the host's is still there.
func (n *node) hostTable(t *testing.T, name string) {
	t.Helper()
	err := n.inside(func() error {
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

// trace explains a connection.
func (n *node) trace(namespace string, args ...string) (string, error) {
	return n.run(append([]string{"net", "trace", "--run-dir=" + n.runDir(), "--namespace=" + namespace}, args...)...)
}
