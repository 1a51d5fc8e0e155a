package message

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

func packed(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	p, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func question(name string, qtype uint16) *dns.Msg {
	return new(dns.Msg).SetQuestion(name, qtype)
}

func TestParse(t *testing.T) {
	m := question("WWW.Example.COM.", dns.TypeAAAA)
	m.SetEdns0(4096, true)
	m.AuthenticatedData = true
	var q Query
	if err := q.Parse(packed(t, m)); err != nil {
		t.Fatal(err)
	}
	if q.ID != m.Id || q.Type != dns.TypeAAAA || q.Class != dns.ClassINET || !q.EDNS || !q.DO || !q.AD || !q.RD || q.CD {
		t.Errorf("got %+v", q)
	}
	if got := string(q.Name()); got != "\x03www\x07example\x03com\x00" {
		t.Errorf("name %q", got)
	}
	if got := string(q.OriginalName()); got != "\x03WWW\x07Example\x03COM\x00" {
		t.Errorf("as asked: %q", got)
	}
	if q.Labels() != 3 || string(q.Label(1)) != "example" || string(q.From(1)) != "\x07example\x03com\x00" || string(q.From(3)) != "\x00" {
		t.Errorf("labels: %d %q %q", q.Labels(), q.Label(1), q.From(1))
	}
	if n := q.Below("\x03com\x00", 1); n != 2 {
		t.Errorf("below com: %d", n)
	}
	if n := q.Below("\x02om\x00", 1); n != -1 {
		t.Errorf("below om: %d", n)
	}
	if got := q.UDPLimit(); got != maxUDP {
		t.Errorf("limit %d", got)
	}
}

func TestParseRefuses(t *testing.T) {
	good := packed(t, question("a.example.", dns.TypeA))
	change := func(f func(p []byte) []byte) []byte { return f(bytes.Clone(good)) }
	twoOPT := question("a.", dns.TypeA)
	twoOPT.SetEdns0(1232, false)
	twoOPT.Extra = append(twoOPT.Extra, twoOPT.Extra[0])
	version := question("a.", dns.TypeA)
	version.SetEdns0(1232, false)
	version.IsEdns0().SetVersion(1)
	for name, c := range map[string]struct {
		packet []byte
		want   error
	}{
		"empty":              {nil, ErrIgnore},
		"short":              {good[:11], ErrIgnore},
		"an answer":          {change(func(p []byte) []byte { p[2] |= 0x80; return p }), ErrIgnore},
		"an update":          {change(func(p []byte) []byte { p[2] |= 5 << 3; return p }), ErrOpcode},
		"no question":        {change(func(p []byte) []byte { p[5] = 0; return p }), ErrFormat},
		"two questions":      {change(func(p []byte) []byte { p[5] = 2; return p }), ErrFormat},
		"with an answer":     {change(func(p []byte) []byte { p[7] = 1; return p }), ErrFormat},
		"name cut off":       {good[:15], ErrFormat},
		"type cut off":       {good[:len(good)-3], ErrFormat},
		"compressed name":    {append(good[:12:12], 0xC0, 12, 0, 1, 0, 1), ErrFormat},
		"name too long":      {append(append(good[:12:12], bytes.Repeat([]byte("\x3faaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"), 4)...), 0, 0, 1, 0, 1), ErrFormat},
		"additional cut off": {change(func(p []byte) []byte { p[11] = 1; return p }), ErrFormat},
		"two OPT records":    {packed(t, twoOPT), ErrFormat},
		"EDNS 1":             {packed(t, version), ErrVersion},
	} {
		var q Query
		err := q.Parse(c.packet)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		if err == nil || err == ErrIgnore {
			continue
		}
		m := new(dns.Msg)
		if e := m.Unpack(Refusal(&q, nil, err)); e != nil {
			t.Errorf("%s: the refusal cannot be read: %v", name, e)
		}
		want := map[error]int{ErrOpcode: dns.RcodeNotImplemented, ErrFormat: dns.RcodeFormatError, ErrVersion: dns.RcodeBadVers}[c.want]
		if m.Rcode != want {
			t.Errorf("%s: refused with %s", name, dns.RcodeToString[m.Rcode])
		}
	}
}

func TestLongestName(t *testing.T) {
	label := strings.Repeat("a", 63)
	longest := strings.Join([]string{label, label, label, label[:61]}, ".") + "."
	var q Query
	if err := q.Parse(packed(t, question(longest, dns.TypeA))); err != nil || len(q.Name()) != 255 {
		t.Errorf("%d bytes: %v", len(q.Name()), err)
	}
	if WireName(longest) != string(q.Name()) || WireName(longest+"a") != "" || WireName("a"+label) != "" || WireName("a..b") != "" {
		t.Error("names in text")
	}
	many := strings.Repeat("a.", 127)
	if err := q.Parse(packed(t, question(many, dns.TypeA))); err != nil || q.Labels() != 127 {
		t.Errorf("%d labels: %v", q.Labels(), err)
	}
	if CountLabels(WireName(many)) != 127 || CountLabels("\x00") != 0 {
		t.Error("count of labels")
	}
}

func TestReverse(t *testing.T) {
	for name, want := range map[string]string{
		"1.2.43.10.in-addr.arpa.":   "10.43.2.1/32",
		"43.10.IN-ADDR.arpa.":       "10.43.0.0/16",
		"in-addr.arpa.":             "0.0.0.0/0",
		"256.2.43.10.in-addr.arpa.": "",
		"9.1.2.43.10.in-addr.arpa.": "",
		"1-2.43.10.in-addr.arpa.":   "",
		"a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.3.4.d.F.ip6.arpa.": "fd43::a/128",
		"3.4.d.f.ip6.arpa.":  "fd43::/16",
		"g.ip6.arpa.":        "",
		"10.ip6.arpa.":       "",
		"2.1.10.in-addr.ar.": "",
	} {
		var q Query
		if err := q.Parse(packed(t, question(name, dns.TypePTR))); err != nil {
			t.Fatal(err)
		}
		got, ok := q.Reverse()
		if !ok && want != "" || ok && got != netip.MustParsePrefix(want) {
			t.Errorf("%s: %v %v, want %s", name, got, ok, want)
		}
	}
}

func TestReplyIsCutOffAtARecord(t *testing.T) {
	m := question("name.example.", dns.TypeA)
	var q Query
	for _, edns := range []bool{false, true} {
		if edns {
			m.SetEdns0(512, false)
		}
		if err := q.Parse(packed(t, m)); err != nil {
			t.Fatal(err)
		}
		var r Reply
		r.Begin(&q, nil, q.UDPLimit())
		n := 0
		for r.Addr(Question, 5, netip.AddrFrom4([4]byte{10, 0, 0, byte(n)})) {
			n++
		}
		r.Additional()
		r.Addr(Question, 5, netip.MustParseAddr("fd00::1"))
		wire := r.Finish()
		got := new(dns.Msg)
		if err := got.Unpack(wire); err != nil {
			t.Fatal(err)
		}
		if !got.Truncated || len(got.Answer) != n || len(wire) > 512 || len(wire) < 512-16-11 {
			t.Errorf("EDNS %v: truncated %v, %d records, %d bytes", edns, got.Truncated, len(got.Answer), len(wire))
		}
		if (got.IsEdns0() != nil) != edns {
			t.Errorf("EDNS %v: %v", edns, got.IsEdns0())
		}
	}
}

// The additional section may be incomplete without the answer being truncated.
func TestAdditionalIsLeftOut(t *testing.T) {
	var q Query
	if err := q.Parse(packed(t, question("name.example.", dns.TypeSRV))); err != nil {
		t.Fatal(err)
	}
	var r Reply
	r.Begin(&q, nil, 120)
	owner, ok := r.Server(5, 100, 80, Name{"\x04host", "\x07example\x00"})
	if !ok {
		t.Fatal("does not fit")
	}
	r.Additional()
	for range 10 {
		r.Addr(owner, 5, netip.MustParseAddr("10.0.0.1"))
	}
	m := new(dns.Msg)
	if err := m.Unpack(r.Finish()); err != nil {
		t.Fatal(err)
	}
	if m.Truncated || len(m.Answer) != 1 || len(m.Extra) == 0 || len(m.Extra) == 10 || m.Extra[0].Header().Name != "host.example." {
		t.Errorf("got %v", m)
	}
}

func TestCopy(t *testing.T) {
	a := question("www.example.", dns.TypeA)
	a.Response, a.Compress, a.AuthenticatedData = true, true, true
	for i := range 40 {
		rr, err := dns.NewRR(fmt.Sprintf("www.example. 300 IN A 192.0.2.%d", i))
		if err != nil {
			t.Fatal(err)
		}
		a.Answer = append(a.Answer, rr)
	}
	ns, err := dns.NewRR("example. 300 IN NS ns.example.")
	if err != nil {
		t.Fatal(err)
	}
	a.Ns = []dns.RR{ns}
	wire := packed(t, a)
	ttls, ends, ok := Layout(wire)
	if !ok || len(ttls) != 41 || len(ends) != 40 {
		t.Fatalf("layout: %d TTLs, %d ends, %v", len(ttls), len(ends), ok)
	}
	m := question("WwW.eXample.", dns.TypeA)
	var q Query
	for _, c := range []struct {
		limit, answers int
		edns           bool
	}{{MaxTCP, 40, false}, {MaxTCP, 40, true}, {512, 30, false}, {512, 29, true}} {
		m.Extra = nil
		if c.edns {
			m.SetEdns0(1232, false)
		}
		if err := q.Parse(packed(t, m)); err != nil {
			t.Fatal(err)
		}
		out := Copy(&q, nil, wire, ends, c.limit)
		got := new(dns.Msg)
		if err := got.Unpack(out); err != nil {
			t.Fatal(err)
		}
		if got.Id != m.Id || got.Question[0].Name != "WwW.eXample." || got.Answer[0].Header().Name != "WwW.eXample." {
			t.Errorf("limit %d: case or ID is lost: %v", c.limit, got.Question)
		}
		if len(got.Answer) != c.answers || got.Truncated != (c.answers < 40) || len(out) > c.limit || (got.IsEdns0() != nil) != c.edns {
			t.Errorf("limit %d, EDNS %v: %d answers, truncated %v, %d bytes", c.limit, c.edns, len(got.Answer), got.Truncated, len(out))
		}
		if got.AuthenticatedData {
			t.Error("AD although the client did not request it")
		}
	}
}

func TestLayoutRefuses(t *testing.T) {
	a := question("www.example.", dns.TypeA)
	rr, err := dns.NewRR("www.example. 300 IN A 192.0.2.1")
	if err != nil {
		t.Fatal(err)
	}
	a.Answer = []dns.RR{rr}
	wire := packed(t, a)
	for n := range wire {
		if _, _, ok := Layout(wire[:n]); ok {
			t.Errorf("%d of %d bytes are taken for a message", n, len(wire))
		}
	}
	if _, _, ok := Layout(append(wire, 0)); ok {
		t.Error("a byte too many")
	}
}

// FuzzParse compares Parse with the library: the library can parse every accepted query
// too, with the same meaning, and the answer can be parsed.
func FuzzParse(f *testing.F) {
	m := question("web.default.svc.cluster.local.", dns.TypeSRV)
	f.Add(packed(f, m))
	m.SetEdns0(4096, true)
	f.Add(packed(f, m))
	f.Add(packed(f, question(".", dns.TypeNS)))
	f.Fuzz(func(t *testing.T, p []byte) {
		var q Query
		err := q.Parse(p)
		if err == ErrIgnore {
			return
		}
		out := new(dns.Msg)
		if err != nil {
			if e := out.Unpack(Refusal(&q, nil, err)); e != nil {
				t.Fatalf("refusal: %v", e)
			}
			return
		}
		in := new(dns.Msg)
		if e := in.Unpack(p); e != nil {
			// Records that Parse ignores may have damaged content; the question may not.
			if in.Question == nil {
				t.Skip()
			}
		}
		if len(in.Question) == 1 {
			name, _, e := dns.UnpackDomainName(q.OriginalName(), 0)
			if e != nil || name != in.Question[0].Name || q.Type != in.Question[0].Qtype || q.Class != in.Question[0].Qclass {
				t.Fatalf("read %q %d %d (%v), the library %v", name, q.Type, q.Class, e, in.Question[0])
			}
		}
		if !bytes.EqualFold(q.Name(), q.OriginalName()) {
			t.Fatalf("%q is not %q", q.Name(), q.OriginalName())
		}
		q.Reverse()
		var r Reply
		r.Begin(&q, nil, q.UDPLimit())
		r.Addr(Question, 1, netip.AddrFrom4([4]byte{1, 2, 3, 4}))
		r.Authority()
		r.StartOfAuthority(len(q.Name())-len(q.From(q.Labels())), SOA{Server: Name{"\x00"}, Mailbox: Name{"\x00"}})
		wire := r.Finish()
		if e := out.Unpack(wire); e != nil || len(out.Answer) != 1 || len(wire) > q.UDPLimit() {
			t.Fatalf("answer: %v %v", e, out)
		}
	})
}

// FuzzLayout passes arbitrary input to Layout; the offsets must be inside the message.
func FuzzLayout(f *testing.F) {
	a := question("www.example.", dns.TypeA)
	a.Response, a.Compress = true, true
	rr, err := dns.NewRR("www.example. 300 IN A 192.0.2.1")
	if err != nil {
		f.Fatal(err)
	}
	a.Answer = []dns.RR{rr, rr}
	f.Add(packed(f, a))
	f.Fuzz(func(t *testing.T, p []byte) {
		ttls, ends, ok := Layout(p)
		if !ok {
			return
		}
		for _, at := range ttls {
			if int(at)+4 > len(p) {
				t.Fatalf("a TTL at %d of %d", at, len(p))
			}
		}
		for _, at := range ends {
			if int(at) > len(p) {
				t.Fatalf("an end at %d of %d", at, len(p))
			}
		}
	})
}
