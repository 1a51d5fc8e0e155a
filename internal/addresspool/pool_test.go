package addresspool

import (
	"fmt"
	"net/netip"
	"testing"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		in   []string
		want string
	}{
		{[]string{"192.0.2.16/28"}, "[{default [192.0.2.16-192.0.2.31]}]"},
		{[]string{"192.0.2.20/28", "fd00::1-fd00::ff", "192.0.2.200"}, "[{default [192.0.2.16-192.0.2.31 fd00::1-fd00::ff 192.0.2.200]}]"},
		{[]string{"a=192.0.2.1", "b=192.0.2.2", "a=192.0.2.3"}, "[{a [192.0.2.1 192.0.2.3]} {b [192.0.2.2]}]"},
		{[]string{"192.0.2.9-192.0.2.1"}, `the range "192.0.2.9-192.0.2.1" ends before it begins`},
		{[]string{"192.0.2.1-fd00::1"}, `"192.0.2.1-fd00::1" is not a range of addresses such as 192.168.1.240/28 or 192.168.1.240-192.168.1.250`},
		{[]string{"x=nonsense"}, `"nonsense" is not a range of addresses such as 192.168.1.240/28 or 192.168.1.240-192.168.1.250`},
		{[]string{"=192.0.2.1"}, `invalid pool name ""`},
		{[]string{"192.0.2.0/24", "a=192.0.2.255"}, "the ranges 192.0.2.0-192.0.2.255 and 192.0.2.255 overlap"},
	} {
		pools, err := Parse(c.in)
		got := fmt.Sprint(pools)
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%v:\n got %s\nwant %s", c.in, got, c.want)
		}
	}
}

func TestFind(t *testing.T) {
	pools, err := Parse([]string{"192.0.2.254-192.0.3.1", "fd00::/64"})
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{"192.0.2.254": true, "192.0.2.255": true}
	free := func(a netip.Addr) bool { return !used[a.String()] }
	if got := pools[0].Find(true, free).String(); got != "192.0.3.0" {
		t.Errorf("found %s", got)
	}
	if got := pools[0].Find(false, free).String(); got != "fd00::" {
		t.Errorf("found %s", got)
	}
	if got := pools[0].Find(false, func(netip.Addr) bool { return false }); got.IsValid() {
		t.Errorf("found %s in a full pool", got)
	}
	if p, ok := In(pools, netip.MustParseAddr("192.0.3.1")); !ok || p.Name != DefaultName {
		t.Error("not found in its pool")
	}
	if _, ok := In(pools, netip.MustParseAddr("192.0.3.2")); ok {
		t.Error("found in a pool that lacks it")
	}
}
