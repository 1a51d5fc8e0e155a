package outside

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"kedge/dns/message"
)

// lookAgain is how old what is known of the host's name servers may be.
const lookAgain = 2 * time.Second

// Stub says who is asked for the names of a zone.
type Stub struct {
	Zone    string // wire format
	Servers []netip.AddrPort
}

// servers are those of the host and those of stub zones. It is guarded by the
// resolver's lock.
type servers struct {
	cfg   Config
	watch Watcher
	log   *slog.Logger

	known map[netip.AddrPort]*upstream // all that are asked for something
	host  group
	stubs []stub // longest zone first

	looked  time.Time
	content string                    // of the file that the host's servers are from
	last    []netip.AddrPort          // that the host had, when it had any
	looping []netip.AddrPort          // that lead back to us
	tokens  map[string]netip.AddrPort // names asked for to find out, in wire format
	closed  bool
}

type stub struct {
	zone    string
	labels  int
	servers group
}

// SetStubs replaces the stub zones.
func (r *Resolver) SetStubs(stubs []Stub) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.servers
	s.stubs = nil
	for _, z := range stubs {
		s.stubs = append(s.stubs, stub{zone: z.Zone, labels: message.CountLabels(z.Zone), servers: s.group(z.Servers)})
	}
	slices.SortFunc(s.stubs, func(a, b stub) int { return b.labels - a.labels })
	s.forget()
	r.cache.clear()
}

// route returns whom to ask, and whether the host has other servers than before.
func (s *servers) route(q *message.Query, now time.Time) (to *group, changed bool) {
	if now.Sub(s.looked) > lookAgain && !s.closed {
		s.looked = now
		changed = s.look()
	}
	for i := range s.stubs {
		if q.Below(s.stubs[i].zone, s.stubs[i].labels) >= 0 {
			return &group{servers: s.stubs[i].servers.servers}, changed
		}
	}
	return &group{servers: s.host.servers}, changed
}

// Look reads the host's name servers now, rather than with the first question.
func (r *Resolver) Look() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.servers.looked = r.now()
	r.servers.look()
}

// look reads the host's servers again. While the host has none, the servers before
// are not forgotten in one respect: when the same come back, answers are still good.
func (s *servers) look() (changed bool) {
	file := s.cfg.ResolvConf()
	data, err := os.ReadFile(file)
	if err != nil {
		if s.content != "" {
			s.log.Warn("the host's name servers are not known", "cause", err)
		}
		data = nil
	}
	if string(data) == s.content {
		return false
	}
	s.content = string(data)
	found := parse(s.content, s.cfg.Own)
	s.log.Info("name servers of the host", "servers", found, "file", file)
	s.looping = nil
	clear(s.tokens)
	s.host = s.group(found)
	s.forget()
	for _, u := range s.host.servers {
		s.seekLoop(u)
	}
	if len(found) == 0 {
		return false
	}
	changed = s.last != nil && !slices.Equal(s.last, found)
	s.last = found
	return changed
}

// group makes a group of servers, known ones and new ones.
func (s *servers) group(addrs []netip.AddrPort) group {
	var g group
	for _, a := range addrs {
		u := s.known[a]
		if u == nil {
			u = newUpstream(a, s.watch, s.log)
			s.known[a] = u
		}
		if !slices.Contains(g.servers, u) {
			g.servers = append(g.servers, u)
		}
	}
	return g
}

// forget lets go of servers that no group has.
func (s *servers) forget() {
	used := map[*upstream]bool{}
	for _, u := range s.host.servers {
		used[u] = true
	}
	for _, z := range s.stubs {
		for _, u := range z.servers.servers {
			used[u] = true
		}
	}
	for a, u := range s.known {
		if !used[u] {
			close(u.gone)
			delete(s.known, a)
		}
	}
}

func (s *servers) close() {
	s.host, s.stubs, s.closed = group{}, nil, true
	s.forget()
}

// parse reads the name servers of a resolv.conf but our own, which would be a loop.
func parse(content string, own []netip.Addr) []netip.AddrPort {
	var out []netip.AddrPort
	for line := range strings.Lines(content) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		a, err := netip.ParseAddr(fields[1])
		if err != nil || slices.Contains(own, a.WithZone("")) {
			continue
		}
		if a.IsUnspecified() { // which the C library takes for this host
			a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		if to := netip.AddrPortFrom(a, 53); !slices.Contains(out, to) {
			out = append(out, to)
		}
	}
	return out
}

// seekLoop sends a server a question that nobody else asks. When it comes to us, the
// server has asked us, and every name that it does not know would go round for ever.
func (s *servers) seekLoop(u *upstream) {
	name := fmt.Sprintf("%d%d.%d%d.", randomID(), randomID(), randomID(), randomID())
	s.tokens[message.WireName(name)] = u.addr
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), attemptTimeout)
		defer cancel()
		m := new(dns.Msg)
		m.SetQuestion(name, dns.TypeHINFO)
		_, _ = exchange(ctx, u.addr, m) // what it answers does not matter
	}()
}

// Looped is told of questions of type HINFO, and says whether one was ours. The server
// that it had been sent to is not asked any more, until the host names others.
func (r *Resolver) Looped(q *message.Query) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.servers
	a, ok := s.tokens[string(q.Name())]
	if !ok {
		return false
	}
	delete(s.tokens, string(q.Name()))
	s.log.Error("a name server of the host asks this resolver: it is left out, or questions would go round for ever", "server", a, "remedy", "name another in the host's resolv.conf, or one with --resolv-conf")
	s.looping = append(s.looping, a)
	s.host.servers = slices.DeleteFunc(slices.Clone(s.host.servers), func(u *upstream) bool { return u.addr == a })
	s.forget()
	return true
}

// Check says what is wrong with the host's name servers, or nil. That none answers is
// no fault of this node's, and an offline one has none.
func (r *Resolver) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.servers.looping) > 0 {
		return fmt.Errorf("name servers of the host lead back to this resolver: %v; name others in its resolv.conf, or with --resolv-conf", r.servers.looping)
	}
	return nil
}

// Sizes is how many answers and denials are kept, and how many were dropped for others.
func (r *Resolver) Sizes() (success, denial int, evicted uint64) {
	success, denial = r.cache.sizes()
	return success, denial, r.cache.evicted.Load()
}
