package peers

import (
	"net/netip"
	"testing"
	"time"
)

// TestMemberWithTwoAddresses: all addresses are probed in parallel, and a second answer does not mean that the member has
// moved.
func TestMemberWithTwoAddresses(t *testing.T) {
	l := &peerLink{located: make(chan struct{}), stale: true} // as in the first probe
	first, second := netip.MustParseAddrPort("192.0.2.1:2380"), netip.MustParseAddrPort("[2001:db8::1]:2380")
	now := Status{LastSeen: time.Now()}
	for _, at := range []netip.AddrPort{first, second, second, first} {
		if l.noteAnswer(at, now) {
			t.Errorf("the member has moved to %v", at)
		}
	}
	if l.location != first {
		t.Errorf("location %v, want %v, the first that answered", l.location, first)
	}
	select {
	case <-l.located:
	default:
		t.Error("located is not closed")
	}
	l.stale = true // the member does not answer at the first address any more
	if !l.noteAnswer(second, now) || l.location != second {
		t.Errorf("the member has not moved, location %v", l.location)
	}
	if l.noteAnswer(first, now) || l.location != second {
		t.Errorf("the member has moved back, location %v", l.location)
	}
}
