package peers

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
)

// TestAddressBookMerge: an entry replaces an older one, and never a newer one.
func TestAddressBookMerge(t *testing.T) {
	open := func(name, id string) *AddressBook {
		b, err := OpenAddressBook(t.TempDir(), name)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Identify("c1", id); err != nil {
			t.Fatal(err)
		}
		return b
	}
	at := func(s string) []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(s)} }
	a := open("a", "1")
	if changed, err := a.setAddresses(at("192.0.2.1:2380")); err != nil || !changed {
		t.Errorf("first address: %v, %v", changed, err)
	}
	if changed, err := a.setAddresses(at("192.0.2.1:2380")); err != nil || changed {
		t.Errorf("the same address again: %v, %v", changed, err)
	}
	two := Peer{ID: "2", Name: "b", URL: NewLoopbackURL(), Addresses: at("192.0.2.2:2380"), Seq: 5}
	older := two
	older.Seq, older.Addresses = 4, at("192.0.2.9:2380")
	for _, tc := range []struct {
		p       Peer
		changed bool
	}{{two, true}, {two, false}, {older, false}, {Peer{ID: "3", URL: "http://127.0.0.1:2380"}, false}} {
		if changed, err := a.Merge([]Peer{tc.p}); err != nil || changed != tc.changed {
			t.Errorf("%+v: %v, %v, want %v", tc.p, changed, err, tc.changed)
		}
	}
	// Another member has a newer entry of this one than the file.
	if _, err := a.Merge([]Peer{{ID: "1", URL: NewLoopbackURL(), Seq: 7, Addresses: at("192.0.2.8:2380")}}); err != nil {
		t.Fatal(err)
	}
	if self := a.Self(); self.Seq != 8 || self.Addresses[0] != at("192.0.2.1:2380")[0] {
		t.Errorf("self is %+v", self)
	}
	again, err := OpenAddressBook(filepath.Dir(a.path), "a")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", again.Get()), fmt.Sprintf("%+v", a.Get()); got != want {
		t.Errorf("read again: %s\nwas: %s", got, want)
	}
	if _, err := a.retain(func(p Peer) bool { return p.ID != "2" }); err != nil || len(a.Get().Others) != 0 {
		t.Errorf("others %+v, %v", a.Get().Others, err)
	}
	if err := os.WriteFile(a.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAddressBook(filepath.Dir(a.path), "a"); err == nil {
		t.Error("a damaged address book was opened")
	}
}

func TestLoopbackAddr(t *testing.T) {
	for range 100 {
		if u := NewLoopbackURL(); !LoopbackAddr(u).IsValid() {
			t.Errorf("%s has no loopback address", u)
		}
	}
	for _, u := range []string{"http://127.64.0.1:2378", "https://127.0.0.1:2378", "https://127.64.0.1:2380", "https://10.0.0.1:2378", "x", ""} {
		if a := LoopbackAddr(u); a.IsValid() {
			t.Errorf("the loopback address of %q is %v", u, a)
		}
	}
}
