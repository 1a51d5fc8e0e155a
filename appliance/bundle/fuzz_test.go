package bundle

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzOpen opens files that begin with an executable, and end with an index and a right trailer.
func FuzzOpen(f *testing.F) {
	f.Add([]byte("\x7fELF"), []byte(`{"format":1}`))
	f.Add(tinyELF(amd64, "program"), []byte(`{"format":1,"executables":[{"architecture":"amd64","sha256":"`+sumOf("x")+`","size":127}],"contents":[{"size":-1}]}`))
	f.Add([]byte("#!/bin/sh\n"), []byte(`{"format":1,"head":{"size":10},"images":[{"name":"a","descriptor":{"digest":"sha256:x"}}]}`))
	f.Fuzz(func(t *testing.T, begin, index []byte) {
		path := filepath.Join(t.TempDir(), "b")
		whole := append(append([]byte{}, begin...), index...)
		for _, end := range [][]byte{nil, trailer{index: int64(len(index)), sum: sha(index)}.bytes()} {
			if err := os.WriteFile(path, append(whole[:len(whole):len(whole)], end...), 0o644); err != nil {
				t.Fatal(err)
			}
			b, err := Open(path)
			if err != nil {
				continue
			}
			if b.Index.ID() == "" || len(b.Index.Executables) == 0 {
				t.Error("an index without executables was accepted")
			}
			_ = b.Verify(t.Context(), nil)
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}
