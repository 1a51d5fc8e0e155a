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

// rereadAfter is the maximum age of the list of the host's name servers.
const rereadAfter = 2 * time.Second

// Stub is a stub zone: a zone with its name servers.
type Stub struct {
	Zone    string // wire format
	Servers []netip.AddrPort
}

// servers are the host's name servers and those of stub zones. The resolver's lock guards
// them.
type servers struct {
	cfg   Config
	watch Watcher
	log   *slog.Logger

	known map[netip.AddrPort]*upstream // all servers in use
	host  group
	stubs []stub // longest zone first

	readAt  time.Time
	content string                    // of the file with the host's servers
	last    []netip.AddrPort          // last non-empty list of the host's servers
	looping []netip.AddrPort          // servers that forward to this resolver
	tokens  map[string]netip.AddrPort // names of loop probes, in wire format
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
	s.closeUnused()
	r.cache.clear()
}

// route returns the servers for a query, and reports whether the host's servers have
// changed.
func (s *servers) route(q *message.Query, now time.Time) (to *group, changed bool) {
	if now.Sub(s.readAt) > rereadAfter && !s.closed {
		s.readAt = now
		changed = s.readHostServers()
	}
	for i := range s.stubs {
		if q.Below(s.stubs[i].zone, s.stubs[i].labels) >= 0 {
			return &group{servers: s.stubs[i].servers.servers}, changed
		}
	}
	return &group{servers: s.host.servers}, changed
}

// ReadHostServers reads the host's name servers now, rather than with the first query.
func (r *Resolver) ReadHostServers() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.servers.readAt = r.now()
	r.servers.readHostServers()
}

// readHostServers reads the host's servers again. While the host has none, the last list is
// kept for one purpose: when the same servers return, the cached answers stay valid.
func (s *servers) readHostServers() (changed bool) {
	file := s.cfg.ResolvConf()
	data, err := os.ReadFile(file)
	if err != nil {
		if s.content != "" {
			s.log.Warn("cannot read the host's name servers", "err", err)
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
	s.closeUnused()
	for _, u := range s.host.servers {
		s.detectLoop(u)
	}
	if len(found) == 0 {
		return false
	}
	changed = s.last != nil && !slices.Equal(s.last, found)
	s.last = found
	return changed
}

// group returns a group of servers, reusing known ones.
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

// closeUnused closes the servers that no group uses.
func (s *servers) closeUnused() {
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
			close(u.closed)
			delete(s.known, a)
		}
	}
}

func (s *servers) close() {
	s.host, s.stubs, s.closed = group{}, nil, true
	s.closeUnused()
}

// parse returns the name servers in a resolv.conf without this resolver's own addresses,
// which would be a loop.
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
		if a.IsUnspecified() { // this host, as for the C library
			a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		}
		if to := netip.AddrPortFrom(a, 53); !slices.Contains(out, to) {
			out = append(out, to)
		}
	}
	return out
}

// detectLoop sends a server a query with a random name. If the query arrives at this
// resolver, the server forwards to it, and queries for unknown names would loop.
func (s *servers) detectLoop(u *upstream) {
	name := fmt.Sprintf("%d%d.%d%d.", randomID(), randomID(), randomID(), randomID())
	s.tokens[message.WireName(name)] = u.addr
	go func() {
		ctx, end := u.whileUsed()
		defer end()
		ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
		defer cancel()
		m := new(dns.Msg)
		m.SetQuestion(name, dns.TypeHINFO)
		_, _ = exchange(ctx, u.addr, m) // the answer does not matter
	}()
}

// IsLoopProbe reports whether a query of type HINFO is a loop probe of this resolver. The
// server to which it was sent is not used until the host's servers change.
func (r *Resolver) IsLoopProbe(q *message.Query) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &r.servers
	a, ok := s.tokens[string(q.Name())]
	if !ok {
		return false
	}
	delete(s.tokens, string(q.Name()))
	s.log.Error("a name server of the host forwards to this resolver; it is not used, because queries would loop", "server", a, "remedy", "set another name server in the host's resolv.conf, or a file with --resolv-conf")
	s.looping = append(s.looping, a)
	s.host.servers = slices.DeleteFunc(slices.Clone(s.host.servers), func(u *upstream) bool { return u.addr == a })
	s.closeUnused()
	return true
}

// Check returns an error if name servers of the host forward to this resolver. Unreachable
// servers are not an error of this node, and an offline node has none.
func (r *Resolver) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.servers.looping) > 0 {
		return fmt.Errorf("name servers of the host forward to this resolver: %v; set others in the host's resolv.conf, or a file with --resolv-conf", r.servers.looping)
	}
	return nil
}

// Sizes returns the numbers of cached answers and negative answers, and of evictions.
func (r *Resolver) Sizes() (success, denial int, evicted uint64) {
	success, denial = r.cache.sizes()
	return success, denial, r.cache.evicted.Load()
}
