package main

import (
	"encoding/xml"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// junit is what the suite writes, as far as a summary needs it.
type junit struct {
	Suites []struct {
		Cases []struct {
			Name    string  `xml:"name,attr"`
			Status  string  `xml:"status,attr"`
			Seconds float64 `xml:"time,attr"`
			Failure *struct {
				Message string `xml:"message,attr"`
			} `xml:"failure"`
		} `xml:"testcase"`
	} `xml:"testsuite"`
}

// summarize reads the JUnit files of a report folder, writes summary.txt beside them
// and returns its text: counts, then each spec that failed with its reason.
func summarize(report string) (string, error) {
	files, err := filepath.Glob(filepath.Join(report, "junit*.xml"))
	if err != nil {
		return "", err
	}
	if len(files) == 0 {
		return "", errors.New("the suite wrote no JUnit file")
	}
	counts := map[string]int{}
	var failed []string
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		var doc junit
		if err := xml.Unmarshal(data, &doc); err != nil {
			return "", fmt.Errorf("read %s: %w", file, err)
		}
		for _, s := range doc.Suites {
			for _, c := range s.Cases {
				if !strings.HasPrefix(c.Name, "[It]") {
					continue
				}
				counts[c.Status]++
				if c.Failure != nil {
					first, _, _ := strings.Cut(c.Failure.Message, "\n")
					failed = append(failed, fmt.Sprintf("FAILED %s\n       %s\n", strings.TrimPrefix(c.Name, "[It] "), first))
				}
			}
		}
	}
	slices.Sort(failed)
	text := fmt.Sprintf("passed %d, failed %d, skipped within %d\n%s", counts["passed"], len(failed), counts["skipped"], strings.Join(failed, ""))
	return text, os.WriteFile(filepath.Join(report, "summary.txt"), []byte(text), 0o644)
}
