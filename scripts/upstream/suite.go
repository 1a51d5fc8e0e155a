package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// suite runs specs, procs at a time, and records each result. Failed specs are not an error of suite.
func (c *cluster) suite(ctx context.Context, rec *record, specs []string, procs int) error {
	part, err := rec.newPart()
	if err != nil {
		return err
	}
	args := append([]string{"--procs", fmt.Sprint(procs), "--timeout", c.o.timeout.String(), "--no-color", "-v"}, focuses(specs)...)
	args = append(args, filepath.Join(c.o.build, "e2e.test"), "--",
		"--kubeconfig", c.kubeconfig, "--provider", "skeleton", "--report-dir", part, "--disable-log-dump", "--dump-logs-on-failure=true",
		"--allowed-not-ready-nodes", "0", "--num-nodes", fmt.Sprint(len(c.nodes)), "--kubectl-path", c.kubectl())
	cmd := exec.CommandContext(ctx, filepath.Join(c.o.build, "bin", "ginkgo"), args...)
	cmd.Dir = part
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.kubeconfig, "KUBECACHEDIR="+filepath.Join(c.dir, "cache"))
	// Ginkgo and its processes are a process group, which gets a signal and is finally killed.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	log, err := os.Create(filepath.Join(part, "e2e.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }() // ESRCH, unless it was too slow
	known := map[string]bool{}
	for _, name := range specs {
		known[name] = true
	}
	done := 0
	parseErr := parse(io.TeeReader(out, log), known, func(r result, output []byte) error {
		done++
		r.End = time.Now().UTC().Truncate(time.Millisecond)
		fmt.Printf("%s %4d/%d %-11s %5.0fs  %s\n", r.End.Format(time.TimeOnly), done, len(specs), r.Status, r.Seconds, r.Name)
		if r.Status == failed {
			// The result is recorded in any case; a missing log is reported.
			if err := c.collect(rec, r, output); err != nil {
				fmt.Fprintln(os.Stderr, "upstream:", err)
			}
		}
		return rec.add(r)
	})
	if parseErr != nil {
		_, _ = io.Copy(log, out) // ginkgo must not wait for a reader
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return errors.Join(fmt.Errorf("interrupted: %w; the next run continues here", context.Cause(ctx)), parseErr)
	case parseErr != nil:
		return parseErr
	case done == 0 || err != nil && !errors.As(err, &exit):
		return fmt.Errorf("the suite ended before its first spec: %w; see %s", err, log.Name())
	}
	return nil
}

// collect stores the details of a failed spec: its output, and what each node has logged during it.
func (c *cluster) collect(rec *record, r result, output []byte) error {
	dir := rec.failureDir(r.Name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	errs := []error{os.WriteFile(filepath.Join(dir, "output.txt"), output, 0o644)}
	const around = 5 * time.Second
	for _, node := range c.nodes {
		log, err := c.log(node)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, node+".log"), within(log, r.begin().Add(-around), r.End.Add(around)), 0o644)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
