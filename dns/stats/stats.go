package stats

import (
	"net/netip"
	goruntime "runtime"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"kedge/dns/outside"
)

// Source is the part that answered: the label "plugin".
type Source int

// Sources.
const (
	Cluster Source = iota
	Hosts
	Cached
	Forwarded
	NoSource // refused before a lookup
	sources
)

// Transport is the transport of a query: labels "proto" and "family".
type Transport int

// Transports.
const (
	UDP4 Transport = iota
	UDP6
	TCP4
	TCP6
	transports
)

// Values of the labels.
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

// typeIndex returns the index of the counter of a type.
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

// Buckets of the histograms, the same as CoreDNS's.
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
	duration  [2]prometheus.Histogram
	querySize [2][2]prometheus.Histogram // by zone and protocol
	sentSize  [2][2]prometheus.Histogram
	panics    atomic.Uint64

	events    [outside.Overload + 1]atomic.Uint64
	unhealthy atomic.Uint64
	cacheSize func() (success, denial int, evicted uint64)

	programming prometheus.Histogram // time from a change of endpoints to the change of names

	// Exchanges with upstream servers. The second is for dashboards from before CoreDNS 1.11.
	exchanges, exchangesBefore *prometheus.HistogramVec
	responsesOf, requestsTo    *prometheus.CounterVec
}

// New returns the counters of a resolver of the domain.
func New(domain string) *Stats {
	s := &Stats{
		server: "dns://:53", zones: [2]string{".", domain + "."},
		programming: newHistogram("coredns_kubernetes_dns_programming_duration_seconds", "Histogram of the time (in seconds) it took to program a dns instance.",
			prometheus.ExponentialBuckets(0.001, 2, 20), "service_kind", "headless_with_selector"),
		exchanges: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "coredns_proxy_request_duration_seconds", Help: "Histogram of the time each request took.", Buckets: timeBuckets,
			ConstLabels: prometheus.Labels{"proxy_name": "forward"},
		}, []string{"to", "rcode"}),
		exchangesBefore: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "coredns_forward_request_duration_seconds", Help: "Histogram of the time each request took.", Buckets: timeBuckets,
		}, []string{"to", "rcode"}),
		responsesOf: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coredns_forward_responses_total", Help: "Counter of responses received per upstream.",
		}, []string{"to", "rcode"}),
		requestsTo: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coredns_forward_requests_total", Help: "Counter of requests made per upstream.",
		}, []string{"to"}),
		cacheSize: func() (int, int, uint64) { return 0, 0, 0 },
	}
	for z := range s.zones {
		labels := s.labels(z)
		s.duration[z] = newHistogram("coredns_dns_request_duration_seconds", "Histogram of the time (in seconds) each request took per zone.", timeBuckets, labels...)
		for p, proto := range []string{"udp", "tcp"} {
			with := append(labels, "proto", proto)
			s.querySize[z][p] = newHistogram("coredns_dns_request_size_bytes", "Size of the requests in bytes per zone and protocol.", sizeBuckets, with...)
			s.sentSize[z][p] = newHistogram("coredns_dns_response_size_bytes", "Size of the returned response in bytes.", sizeBuckets, with...)
		}
	}
	return s
}

// labels returns the names and values of the labels of a zone's metrics.
func (s *Stats) labels(zone int) []string {
	return []string{"server", s.server, "zone", s.zones[zone], "view", ""}
}

// CacheSizes sets the function that returns the cache's sizes.
func (s *Stats) CacheSizes(f func() (success, denial int, evicted uint64)) { s.cacheSize = f }

// Answered counts one query. Sizes are in bytes; ours means that the name is one of the
// cluster.
func (s *Stats) Answered(by Source, ours bool, t Transport, qtype uint16, dnssec bool, rcode int, received, sent int, took time.Duration) {
	z := 0
	if ours {
		z = 1
	}
	s.requests[z][t][typeIndex(qtype)].Add(1)
	s.responses[z][by][rcode&(rcodes-1)].Add(1)
	s.duration[z].Observe(took.Seconds())
	p := int(t / TCP4)
	s.querySize[z][p].Observe(float64(received))
	s.sentSize[z][p].Observe(float64(sent))
	if dnssec {
		s.dnssec[z].Add(1)
	}
}

// Panicked counts a query that caused a panic.
func (s *Stats) Panicked() { s.panics.Add(1) }

// Programmed records the time from a change of endpoints to the change of names.
func (s *Stats) Programmed(took time.Duration) { s.programming.Observe(took.Seconds()) }

// Cache implements outside.Watcher.
func (s *Stats) Cache(e outside.Event) { s.events[e].Add(1) }

// Unhealthy implements outside.Watcher.
func (s *Stats) Unhealthy(netip.AddrPort) { s.unhealthy.Add(1) }

// Exchanged implements outside.Watcher.
func (s *Stats) Exchanged(to netip.AddrPort, took time.Duration, rcode int) {
	name := "FAILED"
	if rcode >= 0 {
		name = dns.RcodeToString[rcode]
	}
	s.exchanges.WithLabelValues(to.String(), name).Observe(took.Seconds())
	s.exchangesBefore.WithLabelValues(to.String(), name).Observe(took.Seconds())
	s.responsesOf.WithLabelValues(to.String(), name).Inc()
	s.requestsTo.WithLabelValues(to.String()).Inc()
}

// Describe implements prometheus.Collector. The set of metrics is not constant, because
// servers change.
func (s *Stats) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (s *Stats) Collect(out chan<- prometheus.Metric) {
	c := collector{out}
	for z := range s.zones {
		base := s.labels(z)
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
		s.duration[z].Collect(out)
		for p := range 2 {
			s.querySize[z][p].Collect(out)
			s.sentSize[z][p].Collect(out)
		}
	}
	c.counter("coredns_panics_total", "A metrics that counts the number of panics.", s.panics.Load())
	c.gauge("coredns_build_info", "A metric with a constant '1' value labeled by version, revision, and goversion from which the resolver was built.", 1,
		"version", "kedge", "revision", "", "goversion", goruntime.Version())
	s.collectCache(c)
	s.collectServers(c)
	s.programming.Collect(out)
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
	for _, m := range []prometheus.Collector{s.exchanges, s.exchangesBefore, s.responsesOf, s.requestsTo} {
		m.Collect(c.out)
	}
	c.counter("coredns_forward_healthcheck_broken_total", "Counter of name servers found not to answer.", s.unhealthy.Load())
	c.counter("coredns_forward_max_concurrent_rejects_total", "Counter of the number of queries rejected because the concurrent queries were at maximum.", s.events[outside.Overload].Load())
}
