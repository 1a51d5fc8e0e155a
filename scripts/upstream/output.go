package main

import (
	"bufio"
	"bytes"
	"io"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Results of a spec.
const (
	passed  = "passed"
	failed  = "failed"
	skipped = "skipped"     // by itself, because the cluster lacks a feature
	broken  = "interrupted" // says nothing about kedge
)

// result is the result of one spec.
type result struct {
	Name    string    `json:"name"`
	Status  string    `json:"status"`
	Seconds float64   `json:"seconds"`
	End     time.Time `json:"end"`
	Reason  string    `json:"reason,omitempty"`
}

func (r result) begin() time.Time { return r.End.Add(-time.Duration(r.Seconds * float64(time.Second))) }

// header matches the first line of ginkgo's output of a spec, after the dots of specs that did not run: "•
// [1.234 seconds]", "• [FAILED] [1.234 seconds]".
var header = regexp.MustCompile(`^S*([•SP]) (?:\[([A-Z !]+)\] )?\[([0-9.]+) seconds\]$`)

// rule matches the line between specs.
const rule = "------------------------------"

// parse reads ginkgo's verbose output and calls each for every finished spec of known, at once, with its part
// of the output. For specs in parallel ginkgo prints everything when they end, the header first and the name
// below it; for a single spec it prints the name at the start, and the header at the end.
func parse(out io.Reader, known map[string]bool, each func(result, []byte) error) error {
	lines := bufio.NewReader(out)
	var block bytes.Buffer // since the last rule
	var r result
	ended := false // the header was read
	end := func() error {
		defer func() { r, ended = result{}, false; block.Reset() }()
		if !ended || r.Name == "" {
			return nil
		}
		return each(r, block.Bytes())
	}
	for {
		line, err := lines.ReadString('\n')
		text := strings.TrimRight(line, "\r\n")
		if text == rule {
			if err := end(); err != nil {
				return err
			}
		} else {
			block.WriteString(line)
		}
		if m := header.FindStringSubmatch(text); m != nil {
			r.Seconds, _ = strconv.ParseFloat(m[3], 64) // the expression matches only numbers
			r.Status, ended = status(m[1], m[2]), true
		} else if r.Name == "" {
			r.Name = nameIn(text, known)
		} else if ended && r.Status != passed && r.Reason == "" {
			r.Reason = reasonIn(text)
		}
		if err == io.EOF {
			return end()
		}
		if err != nil {
			return err
		}
	}
}

// reasonIn returns the reason in a line why a spec failed or did not run. (In the timeline the word is followed
// only by the place.)
func reasonIn(line string) string {
	for _, word := range []string{"[FAILED] ", "[SKIPPED] ", "[TIMEDOUT] ", "[PANICKED] "} {
		if _, reason, ok := strings.Cut(line, word); ok && !strings.HasPrefix(reason, "in [") {
			return reason
		}
	}
	return ""
}

func status(sign, word string) string {
	switch {
	case word == "INTERRUPTED" || word == "ABORTED":
		return broken
	case sign == "S" || sign == "P":
		return skipped
	case word == "":
		return passed
	}
	return failed // also timeouts and panics
}

// nodeKind matches the kind of node in which a spec failed.
var nodeKind = regexp.MustCompile(`\[(It|(Just)?(Before|After)Each|DeferCleanup \(Each\))\] `)

// nameIn returns the spec that a line names: followed by its labels and, after a failure, with the kind of node
// before its last part.
func nameIn(line string, known map[string]bool) string {
	line = strings.Replace(line, nodeKind.FindString(line), "", 1)
	if known[line] {
		return line
	}
	if i := strings.LastIndex(line, " ["); i >= 0 && known[line[:i]] {
		return line[:i]
	}
	return ""
}
