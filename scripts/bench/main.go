// Command bench measures kedge and, in the same run, the same Kubernetes composed of plain upstream components:
// the duration of a start, the usage at idle, the smallest sufficient machine, the duration of starting pods,
// and the sizes of the files. docs/performance.md explains each figure; `make bench` builds all programs and
// calls it.
//
// It needs root, runs real containers, and removes all traces. It is not a test: it does not fail because of a
// bad figure.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

// groups are the values of -only.
var groups = []string{"start", "idle", "limit", "pods", "size"}

// options are the flags of the command.
type options struct {
	runs    int
	only    []string
	which   []string
	out     string
	kedge   string
	program string
	plain   string
	payload string
	dir     string
	port    int
	pods    int
	rest    time.Duration
	idle    time.Duration
	keepLog string
}

func (o options) wants(group string) bool { return slices.Contains(o.only, group) }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parseFlags(args []string) (options, error) {
	var o options
	var only, which string
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.IntVar(&o.runs, "n", 3, "number of measurements of each figure")
	fs.StringVar(&only, "only", strings.Join(groups, ","), "groups of figures to measure")
	fs.StringVar(&which, "of", "kedge,plain", "compositions to measure")
	fs.StringVar(&o.out, "o", "", "write all values as JSON to `FILE`")
	fs.StringVar(&o.kedge, "kedge", "bin/kedge", "the executable to measure")
	fs.StringVar(&o.program, "program", filepath.Join("build/program", goruntime.GOARCH, "kedge"), "the large program, for its size")
	fs.StringVar(&o.plain, "plain", "build/bench/plain", "folder with the programs of the plain composition")
	fs.StringVar(&o.payload, "payload", filepath.Join("build/payload", goruntime.GOARCH), "folder with shim, runc and pause")
	fs.StringVar(&o.dir, "dir", "", "working folder (default: a new folder in /tmp); its file system is measured")
	fs.IntVar(&o.port, "port", 27443, "first of ten ports to use")
	fs.IntVar(&o.pods, "pods", 30, "pods to start one after the other in each run")
	fs.DurationVar(&o.rest, "rest", 60*time.Second, "rest before idleness is measured")
	fs.DurationVar(&o.idle, "idle", time.Minute, "duration of the measurement of idleness")
	fs.StringVar(&o.keepLog, "log", "", "append the compositions' logs to `FILE`")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	o.only, o.which = strings.Split(only, ","), strings.Split(which, ",")
	for _, g := range o.only {
		if !slices.Contains(groups, g) {
			return o, fmt.Errorf("-only: unknown group %q; use %s", g, strings.Join(groups, ", "))
		}
	}
	for _, path := range []*string{&o.kedge, &o.program, &o.plain, &o.payload} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return o, err
		}
		*path = abs
	}
	return o, nil
}

func run(ctx context.Context, args []string) (err error) {
	o, err := parseFlags(args)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("running containers requires root; run it with sudo")
	}
	if o.dir == "" {
		// The path is short, because it contains Unix sockets.
		if o.dir, err = os.MkdirTemp("/tmp", "kbench"); err != nil {
			return err
		}
		defer os.Remove(o.dir)
	}
	var all []composition
	for _, name := range o.which {
		switch name {
		case "kedge":
			all = append(all, newKedge(o))
		case "plain":
			all = append(all, newPlain(o))
		default:
			return fmt.Errorf("-of: unknown composition %q; use kedge or plain", name)
		}
	}
	images := filepath.Join(o.dir, "images.tar")
	if err := writeImages(images, filepath.Join(o.payload, "pause")); err != nil {
		return err
	}
	defer os.Remove(images)

	r := newReport()
	fmt.Println(r.Machine)
	err = measure(ctx, o, all, images, r)
	r.print(os.Stdout) // also the figures measured before a failure
	if err == nil && o.out != "" {
		err = r.writeJSON(o.out)
	}
	return err
}

// measure measures the requested groups of figures, one after the other.
func measure(ctx context.Context, o options, all []composition, images string, r *report) error {
	if o.wants("size") {
		for _, c := range all {
			if err := c.sizes(r); err != nil {
				return err
			}
		}
	}
	if o.wants("start") || o.wants("idle") || o.wants("pods") {
		for i := range o.runs {
			for _, c := range all {
				fmt.Fprintf(os.Stderr, "run %d of %d: %s\n", i+1, o.runs, c.name())
				if err := once(ctx, o, c, images, r); err != nil {
					return fmt.Errorf("%s: %w", c.name(), err)
				}
			}
		}
	}
	if o.wants("limit") {
		for _, c := range all {
			if err := smallestLimit(ctx, o, c, images, r); err != nil {
				return err
			}
		}
	}
	return nil
}

// once measures one composition from an empty machine over idleness and pods to a restart.
func once(ctx context.Context, o options, c composition, images string, r *report) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, c.tail(30))
		}
		err = errors.Join(err, c.remove())
	}()
	if err := c.prepare(ctx, images); err != nil {
		return err
	}
	first, err := start(ctx, c, "first")
	if err != nil {
		return err
	}
	if o.wants("start") {
		first.record(r, c.name(), "empty data directory")
	}
	client, err := c.client()
	if err != nil {
		return err
	}
	if err := deletePod(ctx, client, "first"); err != nil {
		return err
	}
	if o.wants("idle") {
		if err := idle(ctx, o, c, r); err != nil {
			return err
		}
	}
	if o.wants("pods") {
		if err := pods(ctx, o, c, client, r); err != nil {
			return err
		}
	}
	if o.wants("start") {
		if err := c.stop(); err != nil {
			return err
		}
		// Heartbeats have a resolution of one second.
		if err := sleep(ctx, 2*time.Second); err != nil {
			return err
		}
		again, err := start(ctx, c, "again")
		if err != nil {
			return err
		}
		again.record(r, c.name(), "existing data")
		if client, err = c.client(); err != nil {
			return err
		}
		if err := deletePod(ctx, client, "again"); err != nil {
			return err
		}
	}
	return c.stop()
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
