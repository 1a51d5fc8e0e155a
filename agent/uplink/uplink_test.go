package uplink

import (
	"errors"
	"net/netip"
	"os"
	"testing"

	"kedge/internal/tunnel"
)

func TestAllowed(t *testing.T) {
	ranges := []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd00:42::/56")}
	own := func(a netip.Addr) (bool, error) { return a == netip.MustParseAddr("10.42.1.1"), nil }
	for address, want := range map[string]bool{
		"10.42.1.5": true, "10.43.0.1": true, "fd00:42::5": true,
		"10.42.1.1": false, // the node's own
		"10.44.0.1": false, "192.0.2.1": false, "169.254.169.254": false, "fe80::1": false,
		"127.0.0.1": false, "::1": false, "0.0.0.0": false, "::": false, "224.0.0.1": false,
		"::ffff:10.42.1.5": false, "fd6b:6564::1": false,
	} {
		err := allowed(netip.MustParseAddr(address), ranges, own)
		if (err == nil) != want || err != nil && !errors.Is(err, tunnel.ErrForbidden) {
			t.Errorf("%s: %v, want it allowed: %t", address, err, want)
		}
	}
	// Not even where somebody has made the cluster of everything.
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	for _, address := range []string{"127.0.0.1", "::1", "169.254.169.254", "fe80::1", "0.0.0.0", "ff02::1"} {
		if allowed(netip.MustParseAddr(address), all, own) == nil {
			t.Errorf("%s is allowed", address)
		}
	}
	broken := errors.New("no answer")
	if err := allowed(netip.MustParseAddr("10.42.1.5"), ranges, func(netip.Addr) (bool, error) { return false, broken }); !errors.Is(err, broken) {
		t.Errorf("without an answer of the kernel: %v", err)
	}
}

func TestIsOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: asks the kernel for routes")
	}
	if own, err := isOwn(netip.MustParseAddr("127.0.0.1")); err != nil || !own {
		t.Errorf("127.0.0.1 is this machine's: %t, %v", own, err)
	}
}
