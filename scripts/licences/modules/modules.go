// Package modules knows the licences of Go modules, from the files in them. It is for the lists of licences, which
// scripts/licences and scripts/release write; only they import it.
package modules

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// marks are phrases that identify licences, the more specific first.
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

// File is a file of a module about its licence.
type File struct {
	Name string
	Text []byte
}

// Licence returns the SPDX name of the licence of the module in dir, with the files of the licence and of the notices that
// must be passed on. For modules in repositories with several modules they may be in the folder above.
func Licence(dir string) (name string, files []File, err error) {
	all, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return "", nil, err
	}
	for _, f := range all {
		base := strings.ToLower(filepath.Base(f))
		notice := strings.HasPrefix(base, "notice") || strings.HasPrefix(base, "patents")
		if !notice && !strings.HasPrefix(base, "licen") && !strings.HasPrefix(base, "copying") {
			continue
		}
		text, err := os.ReadFile(f)
		if err != nil {
			continue // a folder
		}
		files = append(files, File{filepath.Base(f), text})
		if notice || name != "" {
			continue
		}
		if name = nameOf(text); name == "" {
			return "", nil, fmt.Errorf("%s is not a known licence", filepath.Base(f))
		}
	}
	if name == "" {
		return "", nil, errors.New("no licence file found")
	}
	return name, files, nil
}

func nameOf(text []byte) string {
	words := strings.ToLower(strings.Join(strings.Fields(string(text)), " "))
	for _, m := range marks {
		if strings.Contains(words, m.phrase) {
			return m.name
		}
	}
	return ""
}
