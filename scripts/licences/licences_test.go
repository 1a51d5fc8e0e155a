package main

import (
	"bytes"
	"os"
	"testing"
)

// The list is of what go.mod and the imports say now.
func TestListIsCurrent(t *testing.T) {
	t.Chdir("../..")
	t.Setenv("CGO_ENABLED", "0") // as the executable is built
	want, err := os.ReadFile("docs/third-party-licences.md")
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := run(&got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Bytes(), want) {
		t.Error("docs/third-party-licences.md is not what the executable contains; run make licences")
	}
}
