package stats

import (
	"net/netip"
	goruntime "runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"kedge/dns/outside"
)

// Source is which part answered: the label "plugin".
type Source int

// Sources.
const (
	Cluster Source = iota
	Hosts
	Cached
	Forwarded
	Nobody // refused before anybody looked at it
	sources
)

// Transport is how a query came: labels "proto" and "family".
type Transport int

// Transports.
const (
	UDP4 Transport = iota
	UDP6
	TCP4
	TCP6
	transports
)

// Names of the labels' values.
var (
	sourceNames = [sources]string{"kubernetes", "hosts", "cache", "forward", ""}
	protoNames  = [transports]string{"udp", "udp", "tcp", "tcp"}
	familyNames = [transports]string{"1", "2", "1", "2"}
	typeNames   = [types]string{"A", "AAAA", "CNAME", "HTTPS", "MX", "NS", "PTR", "SOA", "SRV", "SVCB", "TXT", "other"}
)

const (
	types  = 12
	rcodes = 16
)

// typeIndex is where a type is counted.
func typeIndex(t uint16) int {
	switch t {
	case dns.TypeA:
		return 0
	case dns.TypeAAAA:
		return 1
	case dns.TypeCNAME:
		return 2
	case dns.TypeHTTPS:
		return 3
	case dns.TypeMX:
		return 4
	case dns.TypeNS:
		return 5
	case dns.TypePTR:
		return 6
	case dns.TypeSOA:
		return 7
	case dns.TypeSRV:
		return 8
	case dns.TypeSVCB:
		return 9
	case dns.TypeTXT:
		return 10
	}
	return types - 1
}

// Bounds of the histograms, as CoreDNS has them.
var (
	timeBuckets = []float64{.00025, .0005, .001, .002, .004, .008, .016, .032, .064, .128, .256, .512, 1.024, 2.048, 4.096, 8.192}
	sizeBuckets = []float64{0, 100, 200, 300, 400, 511, 1023, 2047, 4095, 8291, 16e3, 32e3, 48e3, 64e3}
)

// Stats are the counters of one resolver.
type Stats struct {
	server string
	zones  [2]string // "." and the cluster's domain

	requests  [2][transports][types]atomic.Uint64
	responses [2][sources][rcodes]atomic.Uint64
	dnssec    [2]atomic.Uint64
	duration  [2]*histogram
	askedSize [2][2]*histogram // by zone and protocol
	sentSize  [2][2]*histogram
	panics    atomic.Uint64

	events    [outside.Overload + 1]atomic.Uint64
	unhealthy atomic.Uint64
	cacheSize func() (success, denial int, evicted uint64)

	programming *histogram // from an endpoint's change to its name

	mu      sync.Mutex // guards what follows
	servers map[exchange]*histogram
}

// exchange is what exchanges with other servers are counted by.
type exchange struct {
	to    netip.AddrPort
	rcode int
}

// New makes the counters of a resolver of the domain.
func New(domain string) *Stats {
	s := &Stats{
		server: "dns://:53", zones: [2]string{".", domain + "."}, servers: map[exchange]*histogram{},
		programming: newHistogram(prometheus.ExponentialBuckets(0.001, 2, 20)),
		cacheSize:   func() (int, int, uint64) { return 0, 0, 0 },
	}
	for z := range 2 {
		s.duration[z] = newHistogram(timeBuckets)
		for p := range 2 {
			s.askedSize[z][p], s.sentSize[z][p] = newHistogram(sizeBuckets), newHistogram(sizeBuckets)
		}
	}
	return s
}

// CacheSizes says where the cache's sizes are read when somebody asks for them.
func (s *Stats) CacheSizes(f func() (success, denial int, evicted uint64)) { s.cacheSize = f }

// Answered counts one query. Sizes are in bytes; ours says whether the name was one of
// the cluster.
func (s *Stats) Answered(by Source, ours bool, t Transport, qtype uint16, dnssec bool, rcode int, asked, sent int, took time.Duration) {
	z := 0
	if ours {
		z = 1
	}
	s.requests[z][t][typeIndex(qtype)].Add(1)
	s.responses[z][by][rcode&(rcodes-1)].Add(1)
	s.duration[z].observe(took.Seconds())
	p := int(t / TCP4)
	s.askedSize[z][p].observe(float64(asked))
	s.sentSize[z][p].observe(float64(sent))
	if dnssec {
		s.dnssec[z].Add(1)
	}
}

// Panicked counts a query that made the resolver panic.
func (s *Stats) Panicked() { s.panics.Add(1) }

// Programmed tells how long it took until a change of endpoints had names.
func (s *Stats) Programmed(took time.Duration) { s.programming.observe(took.Seconds()) }

// Cache implements outside.Watcher.
func (s *Stats) Cache(e outside.Event) { s.events[e].Add(1) }

// Unhealthy implements outside.Watcher.
func (s *Stats) Unhealthy(netip.AddrPort) { s.unhealthy.Add(1) }

// Exchanged implements outside.Watcher.
func (s *Stats) Exchanged(to netip.AddrPort, took time.Duration, rcode int) {
	k := exchange{to, rcode}
	s.mu.Lock()
	h := s.servers[k]
	if h == nil {
		h = newHistogram(timeBuckets)
		s.servers[k] = h
	}
	s.mu.Unlock()
	h.observe(took.Seconds())
}

// Describe implements prometheus.Collector. The set of metrics is not fixed, since
// servers come and go.
func (s *Stats) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s *Stats) Collect(out chan<- prometheus.Metric) {
	c := collector{out}
	for z, zone := range s.zones {
		base := []string{"server", s.server, "zone", zone, "view", ""}
		with := func(more ...string) []string { return append(base[:len(base):len(base)], more...) }
		for t := range transports {
			for i := range types {
				if n := s.requests[z][t][i].Load(); n > 0 {
					c.counter("coredns_dns_requests_total", "Counter of DNS requests made per zone, protocol and family.", n,
						with("proto", protoNames[t], "family", familyNames[t], "type", typeNames[i])...)
				}
			}
		}
		for by := range sources {
			for rcode := range rcodes {
				if n := s.responses[z][by][rcode].Load(); n > 0 {
					c.counter("coredns_dns_responses_total", "Counter of response status codes.", n,
						with("rcode", dns.RcodeToString[rcode], "plugin", sourceNames[by])...)
				}
			}
		}
		c.counter("coredns_dns_do_requests_total", "Counter of DNS requests with DO bit set per zone.", s.dnssec[z].Load(), base...)
		c.histogram("coredns_dns_request_duration_seconds", "Histogram of the time (in seconds) each request took per zone.", s.duration[z], base...)
		for p, proto := range []string{"udp", "tcp"} {
			c.histogram("coredns_dns_request_size_bytes", "Size of the requests in bytes per zone and protocol.", s.askedSize[z][p], with("proto", proto)...)
			c.histogram("coredns_dns_response_size_bytes", "Size of the returned response in bytes.", s.sentSize[z][p], with("proto", proto)...)
		}
	}
	c.counter("coredns_panics_total", "A metrics that counts the number of panics.", s.panics.Load())
	c.gauge("coredns_build_info", "A metric with a constant '1' value labeled by version, revision, and goversion from which the resolver was built.", 1,
		"version", "kedge", "revision", "", "goversion", goruntime.Version())
	s.collectCache(c)
	s.collectServers(c)
	c.histogram("coredns_kubernetes_dns_programming_duration_seconds", "Histogram of the time (in seconds) it took to program a dns instance.", s.programming, "service_kind", "headless_with_selector")
}

func (s *Stats) collectCache(c collector) {
	labels := []string{"server", s.server, "zones", ".", "view", ""}
	n := func(e outside.Event) uint64 { return s.events[e].Load() }
	success, denial, evicted := s.cacheSize()
	kinds := []string{"success", "denial"}
	for i, v := range []float64{float64(success), float64(denial)} {
		c.gauge("coredns_cache_entries", "The number of elements in the cache.", v, append(labels[:6:6], "type", kinds[i])...)
	}
	for i, v := range []uint64{n(outside.Hit) + n(outside.Stale), n(outside.DenialHit)} {
		c.counter("coredns_cache_hits_total", "The count of cache hits.", v, append(labels[:6:6], "type", kinds[i])...)
	}
	c.counter("coredns_cache_requests_total", "The count of cache requests.", n(outside.Hit)+n(outside.DenialHit)+n(outside.Miss)+n(outside.Stale), labels...)
	c.counter("coredns_cache_misses_total", "The count of cache misses.", n(outside.Miss), labels...)
	c.counter("coredns_cache_prefetch_total", "The number of times the cache has prefetched a cached item.", n(outside.Prefetch), labels...)
	c.counter("coredns_cache_served_stale_total", "The number of requests served from stale cache entries.", n(outside.Stale), labels...)
	c.counter("coredns_cache_evictions_total", "The count of cache evictions.", evicted, append(labels[:6:6], "type", "success")...)
}

func (s *Stats) collectServers(c collector) {
	s.mu.Lock()
	servers := make(map[exchange]*histogram, len(s.servers))
	asked := map[netip.AddrPort]uint64{}
	for k, h := range s.servers {
		servers[k] = h
		asked[k.to] += h.count()
	}
	s.mu.Unlock()
	for k, h := range servers {
		to, rcode := k.to.String(), "FAILED"
		if k.rcode >= 0 {
			rcode = dns.RcodeToString[k.rcode]
		}
		c.histogram("coredns_proxy_request_duration_seconds", "Histogram of the time each request took.", h, "proxy_name", "forward", "to", to, "rcode", rcode)
		// What dashboards before CoreDNS 1.11 ask for.
		c.histogram("coredns_forward_request_duration_seconds", "Histogram of the time each request took.", h, "to", to, "rcode", rcode)
		c.counter("coredns_forward_responses_total", "Counter of responses received per upstream.", h.count(), "to", to, "rcode", rcode)
	}
	for to, n := range asked {
		c.counter("coredns_forward_requests_total", "Counter of requests made per upstream.", n, "to", to.String())
	}
	c.counter("coredns_forward_healthcheck_broken_total", "Counter of name servers found not to answer.", s.unhealthy.Load())
	c.counter("coredns_forward_max_concurrent_rejects_total", "Counter of the number of queries rejected because the concurrent queries were at maximum.", s.events[outside.Overload].Load())
}
