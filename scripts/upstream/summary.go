package main

import (
	"cmp"
	"encoding/xml"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// slowest is the number of slow specs in a summary.
const slowest = 10

// report writes summary.txt and junit.xml for the chosen specs, over all parts of the run, and returns the
// summary.
func (r *record) report(chosen []string) (string, error) {
	latest := r.latest()
	var results []result
	for _, name := range chosen {
		if res, ok := latest[name]; ok {
			results = append(results, res)
		}
	}
	text := r.summary(results, len(chosen))
	doc, err := junit(results)
	return text, errors.Join(err,
		os.WriteFile(filepath.Join(r.dir, "summary.txt"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(r.dir, "junit.xml"), doc, 0o644))
}

func (r *record) summary(results []result, chosen int) string {
	var b strings.Builder
	all, areas := map[string]int{}, map[string]map[string]int{}
	for _, res := range results {
		all[res.Status]++
		if areas[area(res.Name)] == nil {
			areas[area(res.Name)] = map[string]int{}
		}
		areas[area(res.Name)][res.Status]++
	}
	fmt.Fprintf(&b, "%d specs: %s\n", chosen, counts(all, chosen))
	if len(results) == 0 {
		return b.String()
	}
	begin, end := r.span()
	fmt.Fprintf(&b, "from %s to %s\n", begin.Format(time.DateTime), end.Format(time.DateTime))
	for _, a := range slices.Sorted(maps.Keys(areas)) {
		fmt.Fprintf(&b, "  %-24s %s\n", a, counts(areas[a], 0))
	}
	// A spec that needed a second attempt is listed: it may reveal an intermittent fault.
	again := map[string]int{}
	for _, res := range r.results {
		if res.Status == failed {
			again[res.Name]++
		}
	}
	for _, res := range results {
		if n := again[res.Name]; n > 0 && res.Status == passed {
			fmt.Fprintf(&b, "PASSED after %d failures: %s\n", n, res.Name)
		}
	}
	for _, res := range results {
		if res.Status == failed {
			fmt.Fprintf(&b, "FAILED %s\n       %s\n       see %s\n", res.Name, res.Reason, r.failureDir(res.Name))
		}
	}
	slow := slices.SortedFunc(slices.Values(results), func(a, b result) int { return cmp.Compare(b.Seconds, a.Seconds) })
	b.WriteString("slowest:\n")
	for _, res := range slow[:min(slowest, len(slow))] {
		fmt.Fprintf(&b, "  %6.0fs %s\n", res.Seconds, res.Name)
	}
	return b.String()
}

// counts returns the numbers by status; of is the total, or 0 if all specs ran.
func counts(n map[string]int, of int) string {
	text := fmt.Sprintf("passed %d, failed %d", n[passed], n[failed])
	if n[skipped] > 0 {
		text += fmt.Sprintf(", skipped by themselves %d", n[skipped])
	}
	if left := of - n[passed] - n[failed] - n[skipped]; of > 0 && left > 0 {
		text += fmt.Sprintf(", not run %d", left)
	}
	return text
}

// area returns the special interest group of a spec.
func area(name string) string {
	if end := strings.IndexByte(name, ']'); strings.HasPrefix(name, "[") && end > 0 {
		return name[:end+1]
	}
	return "others"
}

type junitCase struct {
	Name    string        `xml:"name,attr"`
	Class   string        `xml:"classname,attr"`
	Seconds float64       `xml:"time,attr"`
	Failure *junitMessage `xml:"failure"`
	Skipped *junitMessage `xml:"skipped"`
}

type junitMessage struct {
	Message string `xml:"message,attr"`
}

// junit is the results in the format of CI systems.
func junit(results []result) ([]byte, error) {
	var doc struct {
		XMLName  xml.Name    `xml:"testsuite"`
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Skipped  int         `xml:"skipped,attr"`
		Cases    []junitCase `xml:"testcase"`
	}
	doc.Name = suiteName
	for _, res := range results {
		c := junitCase{Name: res.Name, Class: area(res.Name), Seconds: res.Seconds}
		switch res.Status {
		case failed:
			c.Failure = &junitMessage{res.Reason}
			doc.Failures++
		case skipped:
			c.Skipped = &junitMessage{res.Reason}
			doc.Skipped++
		}
		doc.Cases = append(doc.Cases, c)
	}
	doc.Tests = len(doc.Cases)
	data, err := xml.MarshalIndent(doc, "", " ")
	if err != nil {
		return nil, err
	}
	return append([]byte(xml.Header), append(data, '\n')...), nil
}
