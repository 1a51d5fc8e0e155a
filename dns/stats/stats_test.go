package stats

import (
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"kedge/dns/outside"
)

// collect returns all metrics as name{label=value,...} with their values; for histograms
// the number of observations.
func collect(t *testing.T, s *Stats) map[string]float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	r.MustRegister(s)
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += "," + l.GetName() + "=" + l.GetValue()
			}
			switch {
			case m.Counter != nil:
				out[name] = m.Counter.GetValue()
			case m.Gauge != nil:
				out[name] = m.Gauge.GetValue()
			case m.Histogram != nil:
				out[name] = float64(m.Histogram.GetSampleCount())
			}
		}
	}
	return out
}

func TestNamesOfDashboards(t *testing.T) {
	s := New("cluster.local")
	s.CacheSizes(func() (int, int, uint64) { return 7, 3, 2 })
	s.Answered(Cluster, true, UDP4, dns.TypeA, true, dns.RcodeSuccess, 40, 56, 100*time.Microsecond)
	s.Answered(Cluster, true, UDP4, dns.TypeA, false, dns.RcodeNameError, 40, 90, time.Second)
	s.Answered(Forwarded, false, TCP6, dns.TypeDNSKEY, false, dns.RcodeServerFailure, 40, 90, time.Minute)
	s.Cache(outside.Hit)
	s.Cache(outside.Miss)
	s.Cache(outside.Stale)
	to := netip.MustParseAddrPort("192.0.2.1:53")
	s.Exchanged(to, time.Millisecond, dns.RcodeSuccess)
	s.Exchanged(to, time.Millisecond, -1)
	s.Unhealthy(to)
	s.Programmed(time.Second)
	s.Panicked()
	got := collect(t, s)
	const in, out = ",server=dns://:53,view=,zone=cluster.local.", ",server=dns://:53,view=,zone=."
	const cache = ",server=dns://:53,view=,zones=."
	for name, want := range map[string]float64{
		"coredns_dns_requests_total,family=1,proto=udp,server=dns://:53,type=A,view=,zone=cluster.local.": 2,
		"coredns_dns_requests_total,family=2,proto=tcp,server=dns://:53,type=other,view=,zone=.":          1,
		"coredns_dns_responses_total,plugin=kubernetes,rcode=NOERROR" + in:                                1,
		"coredns_dns_responses_total,plugin=kubernetes,rcode=NXDOMAIN" + in:                               1,
		"coredns_dns_responses_total,plugin=forward,rcode=SERVFAIL" + out:                                 1,
		"coredns_dns_do_requests_total" + in:                                                              1,
		"coredns_dns_request_duration_seconds" + in:                                                       2,
		"coredns_dns_request_duration_seconds" + out:                                                      1,
		"coredns_dns_response_size_bytes,proto=udp" + in:                                                  2,
		"coredns_dns_request_size_bytes,proto=tcp" + out:                                                  1,
		"coredns_cache_entries,server=dns://:53,type=success,view=,zones=.":                               7,
		"coredns_cache_entries,server=dns://:53,type=denial,view=,zones=.":                                3,
		"coredns_cache_hits_total,server=dns://:53,type=success,view=,zones=.":                            2,
		"coredns_cache_requests_total" + cache:                                                            3,
		"coredns_cache_misses_total" + cache:                                                              1,
		"coredns_cache_served_stale_total" + cache:                                                        1,
		"coredns_cache_evictions_total,server=dns://:53,type=success,view=,zones=.":                       2,
		"coredns_forward_requests_total,to=192.0.2.1:53":                                                  2,
		"coredns_forward_responses_total,rcode=FAILED,to=192.0.2.1:53":                                    1,
		"coredns_forward_request_duration_seconds,rcode=NOERROR,to=192.0.2.1:53":                          1,
		"coredns_proxy_request_duration_seconds,proxy_name=forward,rcode=NOERROR,to=192.0.2.1:53":         1,
		"coredns_forward_healthcheck_broken_total":                                                        1,
		"coredns_panics_total": 1,
		"coredns_kubernetes_dns_programming_duration_seconds,service_kind=headless_with_selector": 1,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v (%v), want %v", name, v, ok, want)
		}
	}
}

func BenchmarkAnswered(b *testing.B) {
	s := New("cluster.local")
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			s.Answered(Cluster, true, UDP4, dns.TypeA, false, 0, 60, 76, 3*time.Microsecond)
		}
	})
}
