package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// licences returns the licence of kedge and those of the modules, with the texts that must be passed on with the
// executable. Equal texts are there once.
func (b *build) licences(all []module) ([]byte, error) {
	own, err := os.ReadFile(filepath.Join(b.root, "LICENSE"))
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "# Licences in kedge %s\n\nkedge is under the Apache License 2.0, the first text below. Its executables contain these modules, each under its own\nlicence; the numbers are those of the texts.\n\n"+
		"| module | version | licence | texts |\n|---|---|---|---|\n", b.version)
	number := map[string]int{}
	texts := []string{string(own)}
	number[string(own)] = 1
	for _, m := range all {
		var refs []string
		for _, f := range m.files {
			text := string(f.Text)
			if number[text] == 0 {
				texts = append(texts, text)
				number[text] = len(texts)
			}
			refs = append(refs, fmt.Sprint(number[text]))
		}
		fmt.Fprintf(&out, "| %s | %s | %s | %s |\n", m.path, m.version, m.licence, strings.Join(refs, ", "))
	}
	for i, text := range texts {
		// The fence is longer than any in a text.
		fmt.Fprintf(&out, "\n## Text %d\n\n``````\n%s\n``````\n", i+1, strings.TrimRight(text, "\n"))
	}
	return out.Bytes(), nil
}
