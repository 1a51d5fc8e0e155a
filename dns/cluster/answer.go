package cluster

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"

	"kedge/dns/message"
)

// Verdict is what Answer made of a question.
type Verdict int

// Verdicts.
const (
	NotOurs  Verdict = iota // somebody else must answer
	Answered                // the reply is complete
	Alias                   // the reply has a CNAME, whose target must be asked for
)

// version is that of the specification whose names are answered.
const version = "1.1.0"

// versionTTL is long, since the answer changes only with kedge.
const versionTTL = 28800

// outcome is what became of looking a name up.
type outcome int

const (
	found   outcome = iota // records were written
	noData                 // the name exists, without such records
	noName                 // it does not exist, and nothing below it does
	aliased                // it is another name for something outside
)

// Answer writes the answer to q into r, which was begun, when the name is one of
// the cluster. Target is the name that an alias stands for, in wire format.
func (x *Index) Answer(q *message.Query, r *message.Reply) (v Verdict, target string) {
	if n := q.Below(x.zone, x.labels); n >= 0 {
		r.Authoritative()
		out, target := x.forward(q, r, n)
		if out == aliased {
			return Alias, target
		}
		x.finish(q, r, out, zoneOffset(q, n))
		return Answered, ""
	}
	prefix, ok := q.Reverse()
	if !ok {
		return NotOurs, ""
	}
	return x.backward(q, r, prefix), ""
}

// zoneOffset is where in the name the zone begins that has n labels before it.
func zoneOffset(q *message.Query, n int) int { return len(q.Name()) - len(q.From(n)) }

// finish adds what goes with an answer that has no records.
func (x *Index) finish(q *message.Query, r *message.Reply, out outcome, zone int) {
	if out == found {
		return
	}
	if out == noName {
		r.Fail(message.NXDomain)
	}
	r.Authority()
	r.Start(zone, x.start())
}

func (x *Index) start() message.SOA {
	soa := x.soa
	soa.Serial = x.serial.Load() + 1
	return soa
}

// forward looks up a name of the zone that has n labels before it.
func (x *Index) forward(q *message.Query, r *message.Reply, n int) (outcome, string) {
	if n == 0 {
		return x.apex(q, r), ""
	}
	switch string(q.Label(n - 1)) {
	case "svc":
		return x.service(q, r, n-1)
	case "pod":
		return x.pod(q, r, n-1), ""
	case "dns":
		switch {
		case n == 1:
			return noData, ""
		case n == 2 && string(q.Label(0)) == "ns":
			return x.addresses(q, r, x.cfg.Servers), ""
		}
	case "dns-version":
		if n != 1 {
			break
		}
		if q.Type == message.TypeTXT || q.Type == message.TypeANY {
			r.Text(versionTTL, version)
			return found, ""
		}
		return noData, ""
	}
	return noName, ""
}

// apex answers for the domain itself.
func (x *Index) apex(q *message.Query, r *message.Reply) outcome {
	switch q.Type {
	case message.TypeSOA:
		r.Start(0, x.start())
	case message.TypeNS:
		owner, ok := r.NameServer(x.cfg.TTL, x.soa.Server)
		r.Additional()
		for _, a := range x.cfg.Servers {
			ok = ok && r.Addr(owner, x.cfg.TTL, a)
		}
	default:
		return noData
	}
	return found
}

// service looks up a name with n labels before "svc".
func (x *Index) service(q *message.Query, r *message.Reply, n int) (outcome, string) {
	if n < 2 {
		return x.emptyOrMissing(q, n), ""
	}
	own := q.From(n - 2)
	end := 2 + len(q.Label(n-2)) + len(q.Label(n-1))
	x.mu.RLock()
	rec := x.services[string(own[:end])]
	x.mu.RUnlock()
	if rec == nil {
		return noName, ""
	}
	if rec.alias != "" {
		if n > 2 {
			return noName, ""
		}
		r.Alias(x.cfg.TTL, message.Name{rec.alias})
		return aliased, rec.alias
	}
	switch n - 2 {
	case 0:
		if rec.headless && len(rec.endpoints) == 0 {
			return noName, "" // the specification asks for it
		}
		if q.Type == message.TypeSRV {
			return x.servers(r, rec, nil), ""
		}
		return x.addresses(q, r, rec.addrs), ""
	case 1:
		return x.belowService(q, r, rec), ""
	case 2:
		switch p := rec.find(q.Label(0), q.Label(1)); {
		case p == nil:
			return noName, ""
		case q.Type == message.TypeSRV || q.Type == message.TypeANY:
			return x.servers(r, rec, p), ""
		default:
			return noData, ""
		}
	}
	return noName, ""
}

// belowService answers for an endpoint, or for a protocol, which has names below
// it but no records.
func (x *Index) belowService(q *message.Query, r *message.Reply, rec *record) outcome {
	if label := q.Label(0); len(label) > 1 && label[0] == '_' {
		for _, p := range rec.ports {
			if p.name != "" && p.protocol == string(label[1:]) {
				return noData
			}
		}
		return noName
	}
	eps := rec.at(q.From(0)[:1+len(q.Label(0))])
	if len(eps) == 0 {
		return noName
	}
	if q.Type == message.TypeSRV {
		return x.serversOf(r, rec, eps, nil)
	}
	out := noData
	for i, e := range eps {
		if wants(q, e.addr) && (i == 0 || e.addr != eps[i-1].addr) {
			out = found
			if !r.Addr(message.Question, x.cfg.TTL, e.addr) {
				break
			}
		}
	}
	return out
}

// find returns the port of an SRV name's first two labels, "_http" and "_tcp".
func (r *record) find(name, protocol []byte) *port {
	if len(name) < 2 || len(protocol) < 2 || name[0] != '_' || protocol[0] != '_' {
		return nil
	}
	for i := range r.ports {
		if p := &r.ports[i]; p.name == string(name[1:]) && p.protocol == string(protocol[1:]) {
			return p
		}
	}
	return nil
}

// wants says whether a question is for addresses of this kind.
func wants(q *message.Query, a netip.Addr) bool {
	switch q.Type {
	case message.TypeA:
		return a.Is4()
	case message.TypeAAAA:
		return !a.Is4()
	}
	return q.Type == message.TypeANY
}

// shuffled is how many addresses are put into random order; of more, only the
// first is chosen at random.
const shuffled = 64

// addresses answers with those of the family that is asked for, in another order
// each time: many clients take the first.
func (x *Index) addresses(q *message.Query, r *message.Reply, all []netip.Addr) outcome {
	// Addresses are sorted, those of IPv4 first.
	n4 := 0
	for n4 < len(all) && all[n4].Is4() {
		n4++
	}
	switch q.Type {
	case message.TypeA:
		all = all[:n4]
	case message.TypeAAAA:
		all = all[n4:]
	case message.TypeANY:
	default:
		return noData
	}
	switch n := len(all); {
	case n == 0:
		return noData
	case n == 1:
		r.Addr(message.Question, x.cfg.TTL, all[0])
	case n <= shuffled:
		var order [shuffled]uint8
		for i := range n {
			j := rand.IntN(i + 1)
			order[i] = order[j]
			order[j] = uint8(i)
		}
		for _, i := range order[:n] {
			if !r.Addr(message.Question, x.cfg.TTL, all[i]) {
				break
			}
		}
	default:
		start := rand.IntN(n)
		for i := range n {
			if !r.Addr(message.Question, x.cfg.TTL, all[(start+i)%n]) {
				break
			}
		}
	}
	return found
}

// servers answers SRV for the ports with a name and protocol, or for all ports.
func (x *Index) servers(r *message.Reply, rec *record, want *port) outcome {
	if rec.headless {
		return x.serversOf(r, rec, rec.endpoints, want)
	}
	n := 0
	for _, p := range rec.ports {
		if p.matches(want) {
			n++
		}
	}
	if n == 0 {
		return noData
	}
	var owner message.Owner
	ok := false
	for _, p := range rec.ports {
		if p.matches(want) {
			owner, ok = r.Server(x.cfg.TTL, weight(n), p.number, x.nameOf(rec, ""))
		}
	}
	r.Additional()
	for _, a := range rec.addrs {
		ok = ok && r.Addr(owner, x.cfg.TTL, a)
	}
	return found
}

// matches says whether a port has the name and protocol of another; nil is any.
func (p port) matches(want *port) bool {
	return want == nil || p.name == want.name && p.protocol == want.protocol
}

// maxExtra bounds the hosts whose addresses come with SRV records.
const maxExtra = 64

// serversOf answers with every matching port of endpoints, which are sorted by host.
// The first is chosen at random.
func (x *Index) serversOf(r *message.Reply, rec *record, eps []endpoint, want *port) outcome {
	n := 0
	for i := range eps {
		for j := range eps[i].ports {
			if eps[i].ports[j].matches(want) && !before(eps, i, j) {
				n++
			}
		}
	}
	if n == 0 {
		return noData
	}
	start := rand.IntN(len(eps))
	for start > 0 && eps[start-1].host == eps[start].host {
		start--
	}
	var extra [maxExtra]struct {
		owner message.Owner
		at    int // in eps, of the host's first address
	}
	hosts := 0
	for k := range eps {
		i := (start + k) % len(eps)
		for j, p := range eps[i].ports {
			if !p.matches(want) || before(eps, i, j) {
				continue
			}
			owner, ok := r.Server(x.cfg.TTL, weight(n), p.number, x.nameOf(rec, eps[i].host))
			if ok && hosts < maxExtra && (hosts == 0 || eps[extra[hosts-1].at].host != eps[i].host) {
				extra[hosts].owner, extra[hosts].at = owner, i
				hosts++
			}
		}
	}
	r.Additional()
	for _, e := range extra[:hosts] {
		for i := e.at; i < len(eps) && eps[i].host == eps[e.at].host; i++ {
			if i == e.at || eps[i].addr != eps[i-1].addr {
				r.Addr(e.owner, x.cfg.TTL, eps[i].addr)
			}
		}
	}
	return found
}

// before says whether the host of an endpoint has the same port with another of its
// addresses, listed before: one SRV record stands for both.
func before(eps []endpoint, i, j int) bool {
	for k := i - 1; k >= 0 && eps[k].host == eps[i].host; k-- {
		if slices.Contains(eps[k].ports, eps[i].ports[j]) {
			return true
		}
	}
	return false
}

// weight shares 100 among n servers.
func weight(n int) uint16 { return uint16(max(1, 100/n)) }

// nameOf is the name of a host of a service, or with an empty host of the service.
func (x *Index) nameOf(rec *record, host string) message.Name {
	return message.Name{host, rec.name, x.svc}
}

// emptyOrMissing answers for "svc" and "pod" (n = 0) and namespaces below them (n = 1),
// which have names below them but no records.
func (x *Index) emptyOrMissing(q *message.Query, n int) outcome {
	if n == 0 {
		return noData
	}
	x.mu.RLock()
	exists := x.namespaces[string(q.Label(0))]
	x.mu.RUnlock()
	if exists {
		return noData
	}
	return noName
}

// pod looks up a name with n labels before "pod": a pod's address with dashes.
func (x *Index) pod(q *message.Query, r *message.Reply, n int) outcome {
	if n < 2 {
		return x.emptyOrMissing(q, n)
	}
	x.mu.RLock()
	exists := x.namespaces[string(q.Label(n-1))]
	x.mu.RUnlock()
	if !exists || n != 2 {
		return noName
	}
	a, ok := dashed(q.Label(0))
	if !ok {
		return noName
	}
	if !wants(q, a) {
		return noData
	}
	r.Addr(message.Question, x.cfg.TTL, a)
	return found
}

// dashed reads an address whose dots or colons are dashes.
func dashed(label []byte) (netip.Addr, bool) {
	var b [64]byte
	sep := byte(':')
	if bytes.Count(label, []byte{'-'}) == 3 && !bytes.Contains(label, []byte("--")) {
		sep = '.'
	}
	text := append(b[:0], label...)
	for i, c := range text {
		if c == '-' {
			text[i] = sep
		}
	}
	a, err := netip.ParseAddr(string(text))
	return a, err == nil && a.Zone() == ""
}

// backward answers a reverse name, or the name of a range above such names.
func (x *Index) backward(q *message.Query, r *message.Reply, prefix netip.Prefix) Verdict {
	var ours netip.Prefix
	for _, p := range x.cfg.Ranges {
		if p.Bits() <= prefix.Bits() && p.Contains(prefix.Addr()) {
			ours = p
		}
	}
	out := noName
	if prefix.IsSingleIP() {
		var few [8]pointer // so that nothing is allocated
		x.mu.RLock()
		targets := x.pointersOf(prefix.Addr(), few[:0])
		x.mu.RUnlock()
		if len(targets) > 0 {
			out = x.point(q, r, targets)
			if out == noData && !ours.IsValid() {
				return NotOurs
			}
		}
	} else if ours.IsValid() {
		out = noData
	}
	if out == noName && !ours.IsValid() {
		return NotOurs
	}
	r.Authoritative()
	if out != found {
		x.finish(q, r, out, q.ReverseZone(ours))
	}
	return Answered
}

func (x *Index) point(q *message.Query, r *message.Reply, targets []pointer) outcome {
	if q.Type != message.TypePTR && q.Type != message.TypeANY {
		return noData
	}
	for _, t := range targets {
		if t.endpoint == itself {
			r.Pointer(x.cfg.TTL, x.nameOf(t.record, ""))
			return found
		}
	}
	// Many programs take the first name, and that of a headless service is the better
	// one: it leads back to the address.
	for _, headless := range []bool{true, false} {
		for _, t := range targets {
			if t.record.headless == headless && !r.Pointer(x.cfg.TTL, x.nameOf(t.record, t.host())) {
				return found
			}
		}
	}
	return found
}
