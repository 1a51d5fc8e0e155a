// Command dns measures kedge's resolver and CoreDNS, one after the other, in a network namespace, with the same
// cluster, the same outside names and the same queries. docs/performance.md explains the figures. It needs root
// and the programs that `make bench-dns` builds.
package main

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"
	"time"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-dns:", err)
		os.Exit(1)
	}
}

func run() error {
	services := flag.Int("services", 5000, "services of the cluster, with three endpoints each")
	rounds := flag.Int("n", 3, "number of rounds for each resolver; the median is printed")
	seconds := flag.Int("seconds", 5, "length of each measurement of throughput")
	flag.Parse()
	if os.Geteuid() != 0 {
		return fmt.Errorf("root is required to create network namespaces")
	}
	all := map[string][]figures{}
	for range *rounds {
		for _, name := range []string{"kedge", "CoreDNS"} {
			f, err := measure(name, *services, time.Duration(*seconds)*time.Second)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			all[name] = append(all[name], f)
		}
	}
	return report(all)
}

// figures are the figures of one round.
type figures struct {
	rss, anonymous float64 // MB, after the queries
	kinds          []kindFigures
}

// kindFigures are the figures of one kind of query.
type kindFigures struct {
	kind     string
	rate     float64       // answers per second, with many concurrent queries
	perCore  float64       // answers per second of processor time
	p50, p99 time.Duration // of one query at a time
	lost     int           // queries without an answer within a second
}

func measure(name string, services int, length time.Duration) (f figures, err error) {
	b, err := newBench(many(services))
	if err != nil {
		return f, err
	}
	defer func() {
		if e := b.close(); err == nil {
			err = e
		}
	}()
	begin := b.kedge
	if name == "CoreDNS" {
		begin = b.coredns
	}
	r, err := onProcessor(0, func() (*resolver, error) { return begin(".") })
	if err != nil {
		return f, err
	}
	defer r.stop()
	for _, k := range kinds(services) {
		kf, err := b.load(r, k, length)
		if err != nil {
			return f, fmt.Errorf("%s: %w", k.name, err)
		}
		f.kinds = append(f.kinds, kf)
	}
	time.Sleep(5 * time.Second) // allows a garbage collection
	f.rss, f.anonymous, err = r.memory()
	return f, err
}

// median returns the median of one figure of all rounds.
func median[T int | float64 | time.Duration](rounds []figures, of func(figures) T) T {
	var all []T
	for _, r := range rounds {
		all = append(all, of(r))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

func report(all map[string][]figures) error {
	w := tabwriter.NewWriter(os.Stdout, 2, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tkedge\tCoreDNS\tratio")
	row := func(what, format string, of func(figures) float64) {
		k, c := median(all["kedge"], of), median(all["CoreDNS"], of)
		fmt.Fprintf(w, "%s\t"+format+"\t"+format+"\t%.2f\n", what, k, c, k/c)
	}
	for i, k := range all["kedge"][0].kinds {
		row(k.kind+": answers/s", "%.0f", func(f figures) float64 { return f.kinds[i].rate })
		row(k.kind+": answers per processor second", "%.0f", func(f figures) float64 { return f.kinds[i].perCore })
		row(k.kind+": p50, µs", "%.1f", func(f figures) float64 { return float64(f.kinds[i].p50.Nanoseconds()) / 1e3 })
		row(k.kind+": p99, µs", "%.1f", func(f figures) float64 { return float64(f.kinds[i].p99.Nanoseconds()) / 1e3 })
		row(k.kind+": lost", "%.0f", func(f figures) float64 { return float64(f.kinds[i].lost) })
	}
	row("resident, MB", "%.1f", func(f figures) float64 { return f.rss })
	row("anonymous, MB", "%.1f", func(f figures) float64 { return f.anonymous })
	return w.Flush()
}
