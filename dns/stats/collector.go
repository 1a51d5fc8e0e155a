package stats

import (
	"github.com/prometheus/client_golang/prometheus"
)

// newHistogram returns a histogram with constant labels: names and values alternately.
func newHistogram(name, help string, buckets []float64, labels ...string) prometheus.Histogram {
	l := prometheus.Labels{}
	for i := 0; i < len(labels); i += 2 {
		l[labels[i]] = labels[i+1]
	}
	return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets, ConstLabels: l})
}

// collector sends metrics; labels are names and values alternately.
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
