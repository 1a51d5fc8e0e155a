package stats

import (
	"math"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// histogram counts values into buckets. It is cheaper than the client library's, which
// keeps a consistent sum; readers of ours may see a value in one place before another.
type histogram struct {
	bounds  []float64
	buckets []atomic.Uint64 // one more than bounds
	sum     atomic.Uint64   // bits of a float64
}

func newHistogram(bounds []float64) *histogram {
	return &histogram{bounds: bounds, buckets: make([]atomic.Uint64, len(bounds)+1)}
}

func (h *histogram) observe(v float64) {
	i := 0
	for i < len(h.bounds) && v > h.bounds[i] { // most values are in the first few
		i++
	}
	h.buckets[i].Add(1)
	for {
		old := h.sum.Load()
		if h.sum.CompareAndSwap(old, math.Float64bits(math.Float64frombits(old)+v)) {
			return
		}
	}
}

func (h *histogram) count() (n uint64) {
	for i := range h.buckets {
		n += h.buckets[i].Load()
	}
	return n
}

// collector sends metrics; labels are names and values in turn.
type collector struct{ out chan<- prometheus.Metric }

func desc(name, help string, labels []string) (*prometheus.Desc, []string) {
	var names, values []string
	for i := 0; i < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}
	return prometheus.NewDesc(name, help, names, nil), values
}

func (c collector) counter(name, help string, v uint64, labels ...string) {
	d, values := desc(name, help, labels)
	c.out <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), values...)
}

func (c collector) gauge(name, help string, v float64, labels ...string) {
	d, values := desc(name, help, labels)
	c.out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, values...)
}

func (c collector) histogram(name, help string, h *histogram, labels ...string) {
	d, values := desc(name, help, labels)
	buckets, n := make(map[float64]uint64, len(h.bounds)), uint64(0)
	for i, b := range h.bounds {
		n += h.buckets[i].Load()
		buckets[b] = n
	}
	n += h.buckets[len(h.bounds)].Load()
	c.out <- prometheus.MustNewConstHistogram(d, n, math.Float64frombits(h.sum.Load()), buckets, values...)
}
