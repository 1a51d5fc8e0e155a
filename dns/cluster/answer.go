package cluster

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"slices"

	"kedge/dns/message"
)

// Result is the result of Answer.
type Result int

// Results.
const (
	NotFound Result = iota // not a name of the cluster
	Answered               // the reply is complete
	Alias                  // the reply has a CNAME record, whose target must be looked up
)

// version is the version of the DNS specification of Kubernetes.
const version = "1.1.0"

// versionTTL is long, because the answer changes only with kedge.
const versionTTL = 28800

// outcome is the result of a lookup.
type outcome int

const (
	found   outcome = iota // records were written
	noData                 // the name exists without records of this type
	noName                 // neither the name nor a name below it exists
	aliased                // the name is an alias for a name outside the cluster
)

// Answer writes the answer to q into r, on which Begin was called, if the name belongs to
// the cluster. Target is the target of an alias, in wire format.
func (x *Index) Answer(q *message.Query, r *message.Reply) (v Result, target string) {
	if n := q.Below(x.zone, x.labels); n >= 0 {
		r.Authoritative()
		out, target := x.forwardLookup(q, r, n)
		if out == aliased {
			return Alias, target
		}
		x.addNegative(q, r, out, zoneOffset(q, n))
		return Answered, ""
	}
	prefix, ok := q.Reverse()
	if !ok {
		return NotFound, ""
	}
	return x.reverseLookup(q, r, prefix), ""
}

// zoneOffset returns the offset in the name of the zone that has n labels before it.
func zoneOffset(q *message.Query, n int) int { return len(q.Name()) - len(q.From(n)) }

// addNegative completes an answer without records.
func (x *Index) addNegative(q *message.Query, r *message.Reply, out outcome, zone int) {
	if out == found {
		return
	}
	if out == noName {
		r.SetRcode(message.NXDomain)
	}
	r.Authority()
	r.StartOfAuthority(zone, x.soaRecord())
}

func (x *Index) soaRecord() message.SOA {
	soa := x.soa
	soa.Serial = x.serial.Load() + 1
	return soa
}

// forwardLookup looks up a name of the zone that has n labels before it.
func (x *Index) forwardLookup(q *message.Query, r *message.Reply, n int) (outcome, string) {
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

// apex answers queries for the domain itself.
func (x *Index) apex(q *message.Query, r *message.Reply) outcome {
	switch q.Type {
	case message.TypeSOA:
		r.StartOfAuthority(0, x.soaRecord())
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
			return noName, "" // as the specification requires
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

// belowService answers queries for an endpoint, or for a protocol, which has names below it
// but no records.
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
		if matchesType(q, e.addr) && (i == 0 || e.addr != eps[i-1].addr) {
			out = found
			if !r.Addr(message.Question, x.cfg.TTL, e.addr) {
				break
			}
		}
	}
	return out
}

// find returns the port for the first two labels of an SRV name, "_http" and "_tcp".
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

// matchesType reports whether a query asks for addresses of this family.
func matchesType(q *message.Query, a netip.Addr) bool {
	switch q.Type {
	case message.TypeA:
		return a.Is4()
	case message.TypeAAAA:
		return !a.Is4()
	}
	return q.Type == message.TypeANY
}

// shuffled is the number of addresses up to which the order is random; with more, only the
// first address is random.
const shuffled = 64

// addresses answers with the addresses of the family in the query, in a different order
// each time: many clients use the first.
func (x *Index) addresses(q *message.Query, r *message.Reply, all []netip.Addr) outcome {
	// Addresses are sorted, IPv4 first.
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

// servers answers SRV queries for the ports with a name and protocol, or for all ports.
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

// matches reports whether a port has the name and protocol of want; nil matches any.
func (p port) matches(want *port) bool {
	return want == nil || p.name == want.name && p.protocol == want.protocol
}

// maxExtra is the maximum number of hosts whose addresses accompany SRV records.
const maxExtra = 64

// serversOf answers with every matching port of endpoints, which are sorted by host,
// starting with a random host.
func (x *Index) serversOf(r *message.Reply, rec *record, eps []endpoint, want *port) outcome {
	n := 0
	for i := range eps {
		for j := range eps[i].ports {
			if eps[i].ports[j].matches(want) && !listedBefore(eps, i, j) {
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
			if !p.matches(want) || listedBefore(eps, i, j) {
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

// listedBefore reports whether the host of an endpoint has the same port with another
// address, listed earlier: one SRV record covers both.
func listedBefore(eps []endpoint, i, j int) bool {
	for k := i - 1; k >= 0 && eps[k].host == eps[i].host; k-- {
		if slices.Contains(eps[k].ports, eps[i].ports[j]) {
			return true
		}
	}
	return false
}

// weight divides 100 by the number of servers.
func weight(n int) uint16 { return uint16(max(1, 100/n)) }

// nameOf returns the name of a host of a service, or of the service if host is empty.
func (x *Index) nameOf(rec *record, host string) message.Name {
	return message.Name{host, rec.name, x.svc}
}

// emptyOrMissing answers queries for "svc" and "pod" (n = 0) and namespaces below them (n =
// 1), which have names below them but no records.
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
	if !matchesType(q, a) {
		return noData
	}
	r.Addr(message.Question, x.cfg.TTL, a)
	return found
}

// dashed parses an address with dashes instead of dots or colons.
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

// reverseLookup answers queries for a reverse name, or for the name of a range of
// addresses.
func (x *Index) reverseLookup(q *message.Query, r *message.Reply, prefix netip.Prefix) Result {
	var ours netip.Prefix
	for _, p := range x.cfg.Ranges {
		if p.Bits() <= prefix.Bits() && p.Contains(prefix.Addr()) {
			ours = p
		}
	}
	out := noName
	if prefix.IsSingleIP() {
		var few [8]pointer // avoids an allocation
		x.mu.RLock()
		targets := x.pointersOf(prefix.Addr(), few[:0])
		x.mu.RUnlock()
		if len(targets) > 0 {
			out = x.answerPTR(q, r, targets)
			if out == noData && !ours.IsValid() {
				return NotFound
			}
		}
	} else if ours.IsValid() {
		out = noData
	}
	if out == noName && !ours.IsValid() {
		return NotFound
	}
	r.Authoritative()
	if out != found {
		x.addNegative(q, r, out, q.ReverseZone(ours))
	}
	return Answered
}

func (x *Index) answerPTR(q *message.Query, r *message.Reply, targets []pointer) outcome {
	if q.Type != message.TypePTR && q.Type != message.TypeANY {
		return noData
	}
	// Two services have the same address for a moment, if one replaces the other. The answer then does not depend on the
	// order of their events.
	var service *record
	for _, t := range targets {
		if t.endpoint == serviceItself && (service == nil || t.record.name < service.name) {
			service = t.record
		}
	}
	if service != nil {
		r.Pointer(x.cfg.TTL, x.nameOf(service, ""))
		return found
	}
	// Many programs use the first name, and the name of a headless service is preferable:
	// it resolves to the address.
	for _, headless := range []bool{true, false} {
		for _, t := range targets {
			if t.record.headless == headless && !r.Pointer(x.cfg.TTL, x.nameOf(t.record, t.host())) {
				return found
			}
		}
	}
	return found
}
