// Upstream runs specs of Kubernetes' own end-to-end suite on a kedge that it starts:
//
//	upstream -focus '\[sig-network\] Services' -skip '\[Slow\]'
//
// The node is a host of its own on a network of two, and the suite runs on the other
// host, as a user's machine beside the cluster. JUnit, the suite's output and the
// node's log are left in the report folder; everything else is removed. Package
// main's Makefile builds the suite and its images; see docs/conformance.md. It is no
// part of the product.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	var o options
	flag.StringVar(&o.build, "build", "build/conformance", "folder of the suite, ginkgo and the images")
	flag.StringVar(&o.kedge, "kedge", "bin/kedge", "executable under test")
	flag.StringVar(&o.report, "report", "build/conformance/report", "folder for results; what is in it is removed")
	flag.StringVar(&o.focus, "focus", "", "regular expression of the specs to run")
	flag.StringVar(&o.skip, "skip", "", "regular expression of the specs to leave out")
	flag.IntVar(&o.procs, "procs", 4, "specs that run at the same time")
	flag.DurationVar(&o.timeout, "timeout", 2*time.Hour, "how long the whole run may take")
	keep := flag.Bool("keep", false, "leave the node's directories")
	flag.Parse()
	o.serverFlags = flag.Args()
	if o.focus == "" {
		fmt.Fprintln(os.Stderr, "upstream: say which specs to run with -focus")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "upstream:", err)
		os.Exit(1)
	}
}

type options struct {
	build, kedge, report string
	focus, skip          string
	procs                int
	timeout              time.Duration
	serverFlags          []string // more flags of kedge server
}

func run(ctx context.Context, o options, keep bool) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("the run took more than %v", o.timeout))
	defer cancel()
	if err := os.RemoveAll(o.report); err != nil {
		return err
	}
	if err := os.MkdirAll(o.report, 0o755); err != nil {
		return err
	}
	c, err := newCluster(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close(keep)) }()
	if err := c.start(ctx); err != nil {
		return err
	}
	fmt.Println("node is ready; running", o.focus)
	return c.suite(ctx)
}

// suite runs the specs on the user's host.
func (c *cluster) suite(ctx context.Context) error {
	report, err := filepath.Abs(c.o.report)
	if err != nil {
		return err
	}
	args := []string{"--procs", fmt.Sprint(c.o.procs), "--timeout", c.o.timeout.String(), "--no-color", "--focus", c.o.focus}
	if c.o.skip != "" {
		args = append(args, "--skip", c.o.skip)
	}
	args = append(args, filepath.Join(c.o.build, "e2e.test"), "--",
		"--kubeconfig", c.kubeconfig(), "--provider", "skeleton", "--report-dir", report, "--disable-log-dump",
		"--dump-logs-on-failure=true", "--allowed-not-ready-nodes", "0", "--num-nodes", "1", "--kubectl-path", c.kubectl())
	cmd := exec.CommandContext(ctx, filepath.Join(c.o.build, "bin", "ginkgo"), args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	out, err := os.Create(filepath.Join(report, "e2e.log"))
	if err != nil {
		return err
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.kubeconfig(), "GINKGO_NO_COLOR=TRUE")
	if err := c.user.Start(cmd); err != nil {
		return err
	}
	err = cmd.Wait()
	summary, summaryErr := summarize(report)
	fmt.Print(summary)
	if err != nil {
		err = fmt.Errorf("the suite failed: %w; see %s", errors.Join(context.Cause(ctx), err), out.Name())
	}
	return errors.Join(err, summaryErr)
}

// kubectl is a link by which kedge is kubectl.
func (c *cluster) kubectl() string { return filepath.Join(c.dir, "kubectl") }

// tail is the end of the node's log.
func tail(path string, n int) string {
	data, _ := os.ReadFile(path)
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
