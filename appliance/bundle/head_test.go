package bundle

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// runAs runs a bundle on a machine that calls itself by another name, and returns its output and exit code, and the folder for
// temporary files.
func runAs(t *testing.T, path, machine string, args ...string) (out string, code int, tmp string) {
	t.Helper()
	bin, tmp := t.TempDir(), t.TempDir()
	mustWrite(t, filepath.Join(bin, "uname"), []byte("#!/bin/sh\necho "+machine+"\n"))
	cmd := exec.Command(path, args...)
	cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "TMPDIR=" + tmp}
	text, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(text), cmd.ProcessState.ExitCode(), tmp
}
