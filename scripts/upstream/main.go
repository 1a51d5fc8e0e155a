// Upstream runs specs of Kubernetes' own end-to-end suite on a throwaway cluster:
//
//	upstream -focus '\[sig-network\] Services' -skip '\[Slow\]' -servers 1 -agents 2
//
// "kedge up" creates the cluster, which is removed at the end; the suite runs on this machine, like a user's.
// Specs that can share the cluster run in parallel, then each [Serial] spec alone. The result of every spec is
// recorded at once, so that the next run of the same executables with the same options continues after an
// interruption and repeats failed specs. The record, the suite's output, JUnit, a summary, and the nodes' logs
// during each failure are stored in a folder per kind of run. The Makefile builds the suite and its images; see
// docs/conformance.md. Upstream is not part of the product.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

type options struct {
	build, kedge   string
	focus, skip    string
	list           string // file with the names of specs; empty means the whole suite
	procs          int
	servers        int
	agents         int
	dualStack      bool
	pool           bool
	resume         bool
	timeout        time.Duration
	runs, clusters string // folders
}

func main() {
	var o options
	flag.StringVar(&o.build, "build", "build/conformance", "folder of the suite, ginkgo and the images, and of the results of runs")
	flag.StringVar(&o.kedge, "kedge", "bin/kedge", "executable under test")
	flag.StringVar(&o.focus, "focus", `\[Conformance\]`, "regular expression of the specs to run")
	flag.StringVar(&o.skip, "skip", "", "regular expression of the specs to skip")
	flag.StringVar(&o.list, "list", "", "file with the names of the specs to choose from, one per line; # begins a comment")
	flag.IntVar(&o.procs, "procs", 4, "number of specs that run in parallel, except [Serial] specs")
	flag.IntVar(&o.servers, "servers", 1, "number of servers of the cluster")
	flag.IntVar(&o.agents, "agents", 2, "number of agents of the cluster")
	flag.BoolVar(&o.dualStack, "dual-stack", false, "a cluster with addresses of both families")
	flag.BoolVar(&o.pool, "pool", false, "services of type LoadBalancer get addresses of a pool instead of the nodes' addresses")
	flag.BoolVar(&o.resume, "resume", true, "continue an earlier run of the same executables and options")
	flag.DurationVar(&o.timeout, "timeout", 6*time.Hour, "time limit of the whole run")
	flag.Parse()
	if flag.NArg() > 0 || o.procs < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "upstream:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("the run took more than %v", o.timeout))
	defer cancel()
	for _, path := range []*string{&o.build, &o.kedge} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	o.runs, o.clusters = filepath.Join(o.build, "runs"), filepath.Join(o.build, "clusters")
	rec, err := openRecord(o)
	if err != nil {
		return err
	}
	defer rec.close()
	chosen, err := choose(ctx, o, rec.dir)
	if err != nil {
		return err
	}
	todo := rec.remaining(chosen)
	fmt.Printf("%d specs, %d of them to run; results: %s\n", len(chosen), len(todo), rec.dir)
	var failure error
	if len(todo) > 0 {
		failure = runOn(ctx, o, rec, todo)
	}
	text, err := rec.report(chosen)
	fmt.Print(text)
	if left := rec.remaining(chosen); failure == nil && len(left) > 0 {
		failure = fmt.Errorf("%d of %d specs have not passed", len(left), len(chosen))
	}
	return errors.Join(failure, err)
}

// runOn runs specs on a cluster created for them.
func runOn(ctx context.Context, o options, rec *record, specs []string) (err error) {
	c, err := newCluster(ctx, o, rec.dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.remove()) }()
	parallel, serial := split(specs)
	if len(parallel) > 0 {
		if err := c.suite(ctx, rec, parallel, o.procs); err != nil {
			return err
		}
	}
	if len(serial) > 0 {
		return c.suite(ctx, rec, serial, 1)
	}
	return nil
}
