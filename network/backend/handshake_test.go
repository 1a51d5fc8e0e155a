package backend

import (
	"net/netip"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// TestOneGreets: of two nodes that hear of each other at the same moment one greets at
// once, and the other when that has not helped.
func TestOneGreets(t *testing.T) {
	var at time.Time
	var sides [2]*wireGuard
	var nodes [2]node
	for i := range sides {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			t.Fatal(err)
		}
		sides[i] = &wireGuard{port: 51820, key: key, now: func() time.Time { return at }}
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i)})
		nodes[i] = node{name: a.String(), addrs: []netip.Addr{a}, tunnel: []netip.Addr{a}, key: key.PublicKey().String()}
	}
	greets := func() (n int) {
		for i, w := range sides {
			want, errs := w.wantedPeers(nodes[i], []node{nodes[1-i]})
			if len(errs) > 0 || len(want) != 1 {
				t.Fatalf("peers %v: %v", want, errs)
			}
			for _, p := range want {
				if p.keepalive {
					n++
				}
			}
		}
		return n
	}
	if n := greets(); n != 1 {
		t.Errorf("%d of two greet at once", n)
	}
	at = at.Add(handshakeDelay / 2)
	if n := greets(); n != 1 {
		t.Errorf("%d of two greet soon after", n)
	}
	at = at.Add(handshakeDelay)
	if n := greets(); n != 2 {
		t.Errorf("%d of two greet in the end", n)
	}
}
