package custom

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"kedge/dns/message"
)

func query(t testing.TB, name string) *message.Query {
	t.Helper()
	p, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	q := new(message.Query)
	if err := q.Parse(p); err != nil {
		t.Fatal(err)
	}
	return q
}

func TestParse(t *testing.T) {
	r, err := Parse(map[string]string{
		StubZones: "# of the office\ncorp.example 10.0.0.53 10.0.0.54:5353\n\nlocal [fd00::53]:53\n",
		Hosts:     "192.0.2.7\tPrinter.lan printer # ink is empty\nfd00::7 printer.lan\n",
		Rewrites:  "old.example new.example\n*.old.example *.new.example\n*.a.old.example *.b.example\n",
	}, "cluster.local", nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Stubs) != 2 || r.Stubs[0].Zone != message.WireName("corp.example") || r.Stubs[0].Servers[0].String() != "10.0.0.53:53" || r.Stubs[0].Servers[1].String() != "10.0.0.54:5353" {
		t.Errorf("stub zones: %+v", r.Stubs)
	}
	addrs, ok := r.Host(query(t, "PRINTER.lan."))
	if !ok || len(addrs) != 2 || addrs[0].String() != "192.0.2.7" {
		t.Errorf("host: %v", addrs)
	}
	if _, ok := r.Host(query(t, "x.printer.lan.")); ok {
		t.Error("a name below a host is taken for it")
	}
	if name, ok := r.Pointer(netip.MustParseAddr("192.0.2.7")); !ok || name != message.WireName("printer.lan") {
		t.Errorf("pointer: %q", name)
	}
	for from, want := range map[string]string{
		"OLD.example.":     "new.example",
		"x.y.old.example.": "x.y.new.example",
		"x.a.old.example.": "x.b.example", // the longest
		"a.old.example.":   "a.new.example",
		"xold.example.":    "",
		"new.example.":     "",
	} {
		got, ok := r.Rewrite(query(t, from))
		if ok != (want != "") || ok && got != message.WireName(want) {
			t.Errorf("%s: %q, want %s", from, got, want)
		}
	}
	long := strings.Repeat("a234567890.", 22) + "old.example."
	if got, ok := r.Rewrite(query(t, long)); !ok || len(got) > 255 {
		t.Errorf("long name: %d bytes, %v", len(got), ok)
	}
}

func TestMistakes(t *testing.T) {
	for line, want := range map[string]string{
		"hosts|printer 192.0.2.1":                                         `hosts, line 1: "printer" is not an address`,
		"hosts|\n\n192.0.2.1":                                             "hosts, line 3: 192.0.2.1 has no names",
		"hosts|192.0.2.1 a..b":                                            `hosts, line 1: "a..b" is not a name`,
		"stub-zones|corp.example":                                         "stub-zones, line 1: corp.example has no name servers",
		"stub-zones|corp.example ns.corp.example":                         `stub-zones, line 1: "ns.corp.example" is not an IP address, with or without a port`,
		"stub-zones|a.cluster.local 192.0.2.1":                            "stub-zones, line 1: a.cluster.local is the cluster domain or below it",
		"stub-zones|cluster.local 192.0.2.1":                              "stub-zones, line 1: cluster.local is the cluster domain or below it",
		"stub-zones|a.example 10.43.0.10":                                 "stub-zones, line 1: 10.43.0.10 is the cluster DNS address",
		"stub-zones|a.example 192.0.2.1\nA.example. 192.0.2.2":            "stub-zones, line 2: A.example. is defined twice",
		"rewrites|a.example":                                              "rewrites, line 1: expected two names: the name in the query and the name to resolve instead",
		"rewrites|*.a.example b.example":                                  `rewrites, line 1: either both names begin with "*." or neither does`,
		"rewrites|a.example A.example":                                    "rewrites, line 1: a.example would be rewritten in a loop",
		"rewrites|*.a.example *.b.a.example":                              "rewrites, line 1: *.a.example would be rewritten in a loop",
		"rewrites|a.example b.example\na.example c.example # and another": "rewrites, line 2: a.example is defined twice",
		"Corefile|. { forward }":                                          "Corefile: unknown key; the keys are hosts, rewrites and stub-zones",
	} {
		key, text, _ := strings.Cut(line, "|")
		_, err := Parse(map[string]string{key: text}, "cluster.local", []netip.Addr{netip.MustParseAddr("10.43.0.10")})
		var m Mistake
		if !errors.As(err, &m) || err.Error() != want {
			t.Errorf("%q:\n got %v\nwant %s", line, err, want)
		}
	}
	_, err := Parse(map[string]string{Hosts: "x y\n1.2.3.4 a\nz z"}, "cluster.local", nil)
	if n := strings.Count(err.Error(), "\n") + 1; n != 2 {
		t.Errorf("%d mistakes are told: %v", n, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("a.example 1.2.3.4", "1.2.3.4 a b", "*.a.b *.c.d")
	f.Fuzz(func(t *testing.T, stubs, hosts, rewrites string) {
		r, err := Parse(map[string]string{StubZones: stubs, Hosts: hosts, Rewrites: rewrites}, "cluster.local", nil)
		if err != nil {
			return
		}
		q := query(t, "x.a.b.")
		r.Host(q)
		if to, ok := r.Rewrite(q); ok && !q.SetName(to, 1) {
			t.Fatalf("rewritten to %q, which is no name", to)
		}
	})
}
