// Licences writes the list of the modules that the executable contains, with the
// licence of each. `make licences` calls it; it is no part of the product.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// programs are what is linked into the executable or travels inside it.
var programs = []string{".", "./launcher", "./runtime/shim", "github.com/opencontainers/runc"}

type module struct{ Path, Version, Dir string }

func main() {
	if err := run(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "licences:", err)
		os.Exit(1)
	}
}

func run(w io.Writer) error {
	modules, err := linked()
	if err != nil {
		return err
	}
	fmt.Fprint(w, "# Third-party licences\n\nMade by `make licences`. The kedge executable contains these modules, each under its own licence;\n"+
		"the texts are in the modules. libseccomp (LGPL-2.1) is linked into the runc that travels inside.\n\n| module | version | licence |\n|---|---|---|\n")
	var unknown []string
	for _, m := range modules {
		name, err := licence(m.Dir)
		if err != nil {
			unknown = append(unknown, m.Path+": "+err.Error())
			continue
		}
		fmt.Fprintf(w, "| %s | %s | %s |\n", m.Path, m.Version, name)
	}
	if len(unknown) > 0 {
		return fmt.Errorf("look at these by hand and teach the program:\n%s", strings.Join(unknown, "\n"))
	}
	return nil
}

// linked returns the modules of which any package is in one of the programs.
func linked() ([]module, error) {
	cmd := exec.Command("go", append([]string{"list", "-deps", "-json=Module"}, programs...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	seen := map[string]module{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			Module *struct {
				module
				Main    bool
				Replace *module
			}
		}
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if m := p.Module; m != nil && !m.Main {
			found := m.module
			if m.Replace != nil {
				found.Version, found.Dir = m.Replace.Version, m.Replace.Dir
			}
			seen[m.Path] = found
		}
	}
	var all []module
	for _, m := range seen {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b module) int { return strings.Compare(a.Path, b.Path) })
	return all, nil
}

// marks are phrases by which licences are told apart, the more special first.
var marks = []struct{ name, phrase string }{
	{"Apache-2.0", "apache license version 2.0"},
	{"Apache-2.0", "licensed under the apache license"},
	{"MPL-2.0", "mozilla public license version 2.0"},
	{"MPL-2.0", "mozilla public license, version 2.0"},
	{"ISC", "permission to use, copy, modify, and/or distribute this software for any purpose"},
	{"ISC", "permission to use, copy, modify, and distribute this software for any purpose"},
	{"MIT", "permission is hereby granted, free of charge"},
	{"BSD-3-Clause", "neither the name of"},
	{"BSD-3-Clause", "names of its contributors may not be used"},
	{"BSD-2-Clause", "redistribution and use in source and binary forms"},
}

// licence finds the licence of the module in dir, or in the folder above it for
// modules whose repository holds several.
func licence(dir string) (string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		base := strings.ToLower(filepath.Base(f))
		if !strings.HasPrefix(base, "licen") && !strings.HasPrefix(base, "copying") {
			continue
		}
		data, err := os.ReadFile(f)
		if err != nil {
			continue // a folder
		}
		text := strings.ToLower(strings.Join(strings.Fields(string(data)), " "))
		for _, m := range marks {
			if strings.Contains(text, m.phrase) {
				return m.name, nil
			}
		}
		return "", fmt.Errorf("%s is of no kind that is known", filepath.Base(f))
	}
	return "", errors.New("has no licence file")
}
