package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"

	"kedge/internal/test/host"
)

// TestSameAsCoreDNS asks both resolvers random questions about the same random cluster.
// Where kedge differs on purpose, different says why.
func TestSameAsCoreDNS(t *testing.T) {
	host.RequireRoot(t)
	const root = "../../.."
	for _, program := range []string{"resolver", "coredns"} {
		if _, err := os.Stat(root + "/" + programs + "/" + program); err != nil {
			t.Skip("needs the programs of make bench-dns-programs:", err)
		}
	}
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	o := varied(rng)
	b, err := newBench(o)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.close(); err != nil {
			t.Error(err)
		}
	}()
	ours, err := b.kedge(root)
	if err != nil {
		t.Fatal(err)
	}
	defer ours.stop()
	theirs, err := b.coredns(root)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.stop()
	types := []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeSRV, dns.TypePTR, dns.TypeCNAME, dns.TypeTXT, dns.TypeMX, dns.TypeNS, dns.TypeSOA, dns.TypeHTTPS}
	equal, reasons := 0, map[string]int{}
	const questions = 3000
	for range questions {
		name, qtype := randomName(rng, o), types[rng.IntN(len(types))]
		a, err := b.ask(ours, name, qtype)
		if err != nil {
			t.Fatalf("kedge: %s: %v", name, err)
		}
		c, err := b.ask(theirs, name, qtype)
		if err != nil {
			t.Fatalf("CoreDNS: %s: %v", name, err)
		}
		got, want := summary(a), summary(c)
		if got == want {
			equal++
			continue
		}
		if why := different(name, qtype, a, c); why != "" {
			reasons[why]++
			continue
		}
		t.Errorf("%s %s:\n  kedge   %s\n  CoreDNS %s", dns.TypeToString[qtype], name, got, want)
	}
	t.Logf("%d of %d answers are equal; of the others, %v", equal, questions, reasons)
	if equal < questions/2 {
		t.Error("too few: the questions are about nothing")
	}
}

// randomName is a name of an object, with labels added, removed and changed.
func randomName(rng *rand.Rand, o objects) string {
	s := o.services[rng.IntN(len(o.services))]
	name := s.Name + "." + s.Namespace + ".svc.cluster.local."
	switch rng.IntN(14) {
	case 0, 1, 2:
	case 3, 4:
		if len(s.Spec.Ports) > 0 {
			p := s.Spec.Ports[rng.IntN(len(s.Spec.Ports))]
			name = fmt.Sprintf("_%s._%s.%s", p.Name, strings.ToLower(string(p.Protocol)), name)
		}
	case 5, 6, 7:
		var of []string
		for _, sl := range o.slices {
			if sl.Labels["kubernetes.io/service-name"] != s.Name || sl.Namespace != s.Namespace {
				continue
			}
			for _, e := range sl.Endpoints {
				host := strings.NewReplacer(".", "-", ":", "-").Replace(e.Addresses[0])
				if e.Hostname != nil {
					host = *e.Hostname
				}
				of = append(of, host)
			}
		}
		if len(of) > 0 {
			name = of[rng.IntN(len(of))] + "." + name
		}
	case 8:
		if len(s.Spec.ClusterIPs) > 0 && s.Spec.ClusterIPs[0] != "None" {
			name, _ = dns.ReverseAddr(s.Spec.ClusterIPs[rng.IntN(len(s.Spec.ClusterIPs))])
		}
	case 9:
		if len(o.slices) > 0 {
			if sl := o.slices[rng.IntN(len(o.slices))]; len(sl.Endpoints) > 0 {
				name, _ = dns.ReverseAddr(sl.Endpoints[rng.IntN(len(sl.Endpoints))].Addresses[0])
			}
		}
	case 10:
		name = []string{"10-42-0-1.", "fd42--1.", "10-42-0-999.", "x."}[rng.IntN(4)] + []string{"default", "other", "missing"}[rng.IntN(3)] + ".pod.cluster.local."
	case 11:
		name = []string{"cluster.local.", "svc.cluster.local.", "pod.cluster.local.", "default.svc.cluster.local.", "missing.svc.cluster.local.", "other.pod.cluster.local.", "dns-version.cluster.local.", "nothing.cluster.local.", "x.dns-version.cluster.local."}[rng.IntN(9)]
	case 12:
		name = "www.example.com." + name // as a search list makes them
	case 13:
		name = fmt.Sprintf("n%d.example.org.", rng.IntN(20))
	}
	if rng.IntN(10) == 0 {
		name = "x" + name
	}
	if rng.IntN(4) == 0 {
		name = strings.ToUpper(name)
	}
	return name
}

// summary is what of an answer must be equal: the response code and the records, without
// times, weights and the numbers of SOA records.
func summary(m *dns.Msg) string {
	var out []string
	for i, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			h := rr.Header()
			data := strings.ToLower(strings.TrimPrefix(rr.String(), h.String()))
			switch rr := rr.(type) {
			case *dns.SOA:
				data = ""
			case *dns.SRV:
				data = fmt.Sprint(strings.ToLower(rr.Target), rr.Port)
			}
			out = append(out, fmt.Sprintf("%d:%s %s %s", i, strings.ToLower(h.Name), dns.TypeToString[h.Rrtype], data))
		}
	}
	slices.Sort(out)
	return dns.RcodeToString[m.Rcode] + " " + strings.Join(slices.Compact(out), ", ")
}

// different says why an answer of ours differs on purpose, or "".
func different(name string, qtype uint16, ours, theirs *dns.Msg) string {
	name = strings.ToLower(name)
	label := name[:strings.IndexByte(name, '.')]
	alias := func(m *dns.Msg) bool { return len(m.Answer) > 0 && m.Answer[0].Header().Rrtype == dns.TypeCNAME }
	empty := func(m *dns.Msg) bool { return m.Rcode == dns.RcodeSuccess && len(m.Answer) == 0 }
	denied := func(m *dns.Msg) bool { return m.Rcode == dns.RcodeNameError }
	switch {
	case strings.HasSuffix(name, ".arpa."):
		switch {
		case denied(ours) && (denied(theirs) || empty(theirs) || qtype != dns.TypePTR):
			return "reverse names of the ranges are denied here, by their own zone"
		case empty(ours) && qtype != dns.TypePTR:
			return "a reverse name exists, whatever record is asked for"
		}
	case qtype == dns.TypeSOA && denied(ours) && empty(theirs):
		return "a name that does not exist has no SOA record either"
	case alias(ours) && alias(theirs) && len(ours.Ns) > 0 && len(theirs.Ns) == 0:
		return "what denies an alias's target comes with it (RFC 2308)"
	case qtype == dns.TypeNS && empty(theirs) && label == "cluster":
		return "CoreDNS names itself only where it finds its own endpoints"
	case empty(ours) && denied(theirs) && (label == "dns-version" || qtype == dns.TypeTXT):
		return "a name exists, whatever record is asked for"
	case alias(ours) && !alias(theirs):
		return "a name that stands for another does so for every type"
	case empty(ours) && strings.HasPrefix(label, "_") && (qtype == dns.TypeA || qtype == dns.TypeAAAA):
		return "names of ports have SRV records only"
	case empty(ours) && strings.HasPrefix(label, "_") && denied(theirs):
		return "names of ports exist, whatever record is asked for"
	case empty(ours) && qtype == dns.TypeSRV && strings.HasSuffix(name, ".pod.cluster.local."):
		return "a pod's address has no port"
	}
	return ""
}
