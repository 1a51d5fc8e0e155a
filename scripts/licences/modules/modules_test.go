package modules

import (
	"os"
	"path/filepath"
	"testing"
)

func TestLicence(t *testing.T) {
	mit := "Permission is hereby granted,\nfree of charge, to any person"
	for _, test := range []struct {
		files map[string]string
		name  string
		n     int
	}{
		{map[string]string{"LICENSE": mit}, "MIT", 1},
		{map[string]string{"LICENSE": mit, "NOTICE": "by us", "README": "x"}, "MIT", 2},
		{map[string]string{"COPYING": mit, "LICENSE.docs": "as you like"}, "MIT", 2},
		{map[string]string{"LICENSE": "as you like"}, "", 0},
		{map[string]string{"NOTICE": mit}, "", 0},
	} {
		dir := t.TempDir()
		for name, text := range test.files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		name, files, err := Licence(dir)
		if name != test.name || len(files) != test.n || (err == nil) != (test.name != "") {
			t.Errorf("%v: %q, %d files, %v", test.files, name, len(files), err)
		}
	}
}
