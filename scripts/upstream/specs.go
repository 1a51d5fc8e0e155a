package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// suiteName is the start of every text that ginkgo matches with -focus.
const suiteName = "Kubernetes e2e suite"

// choose returns the names of the specs that the options select, in the suite's order.
func choose(ctx context.Context, o options, dir string) ([]string, error) {
	file := filepath.Join(dir, "suite.json")
	args := []string{"--ginkgo.dry-run", "--ginkgo.json-report=" + file}
	if o.focus != "" {
		args = append(args, "--ginkgo.focus="+o.focus)
	}
	if o.skip != "" {
		args = append(args, "--ginkgo.skip="+o.skip)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(o.build, "e2e.test"), args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("list the specs of the suite: %w\n%s", errors.Join(context.Cause(ctx), err), out)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file); err != nil {
		return nil, err
	}
	names, err := readDryRun(data)
	if err != nil || o.list == "" {
		return names, err
	}
	text, err := os.ReadFile(o.list)
	if err != nil {
		return nil, err
	}
	return pick(names, string(text))
}

// readDryRun returns the names of the specs that a dry run would have run.
func readDryRun(data []byte) ([]string, error) {
	var suites []struct {
		SpecReports []struct {
			LeafNodeType, LeafNodeText, State string
			ContainerHierarchyTexts           []string
		}
	}
	if err := json.Unmarshal(data, &suites); err != nil {
		return nil, fmt.Errorf("read the suite's report: %w", err)
	}
	var names []string
	for _, s := range suites {
		for _, r := range s.SpecReports {
			if r.LeafNodeType == "It" && r.State == "passed" {
				names = append(names, strings.Join(append(r.ContainerHierarchyTexts, r.LeafNodeText), " "))
			}
		}
	}
	if len(names) == 0 {
		return nil, errors.New("no spec of the suite matches")
	}
	return names, nil
}

// pick returns the names that are in a list. A name that is not in the suite is an error: otherwise the list
// would silently shrink with the next version.
func pick(names []string, list string) ([]string, error) {
	known := map[string]bool{}
	for _, n := range names {
		known[n] = true
	}
	var picked []string
	var errs []error
	for line := range strings.Lines(list) {
		name := strings.TrimSpace(line)
		switch {
		case name == "" || strings.HasPrefix(name, "#"):
		case !known[name]:
			errs = append(errs, fmt.Errorf("the suite has no spec %q that matches", name))
		default:
			picked = append(picked, name)
		}
	}
	return picked, errors.Join(errs...)
}

// split separates specs that can run in parallel from the others.
func split(names []string) (parallel, serial []string) {
	for _, n := range names {
		if strings.Contains(n, "[Serial]") {
			serial = append(serial, n)
		} else {
			parallel = append(parallel, n)
		}
	}
	return parallel, serial
}

// Linux accepts no argument of more than 128 KiB.
const maxFocus = 100 << 10

// focuses returns ginkgo's arguments for running exactly these specs.
func focuses(names []string) []string {
	var args []string
	var some []string
	size := 0
	flush := func() {
		if len(some) > 0 {
			args = append(args, "--focus", "^"+suiteName+" (?:"+strings.Join(some, "|")+")$")
		}
		some, size = nil, 0
	}
	for _, n := range names {
		q := regexp.QuoteMeta(n)
		if size += len(q) + 1; size > maxFocus {
			flush()
			size = len(q) + 1
		}
		some = append(some, q)
	}
	flush()
	return args
}
