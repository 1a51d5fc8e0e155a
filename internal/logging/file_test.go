package logging

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestFile: lines are rotated, none is lost, and what is written to the standard outputs is in the file too. It runs in a
// process of its own, whose outputs are redirected.
func TestFile(t *testing.T) {
	const lines, width = 1000, 100
	if dir := os.Getenv("KEDGE_TEST_LOG"); dir != "" {
		f, err := OpenFile(dir)
		if err != nil {
			t.Fatal(err)
		}
		f.max = 300 * width
		for i := range lines {
			fmt.Fprintf(f, "%0*d\n", width-1, i)
		}
		fmt.Fprintln(os.Stdout, "out")
		fmt.Fprintln(os.Stderr, "crash")
		os.Exit(0)
	}
	path := filepath.Join(t.TempDir(), "kedge.log")
	if err := os.WriteFile(path, []byte("before\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=TestFile$")
	cmd.Env = append(os.Environ(), "KEDGE_TEST_LOG="+path)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("%v: %s", err, out)
	}
	var all string
	for _, suffix := range []string{".3", ".2", ".1", ""} {
		data, err := os.ReadFile(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > 301*width {
			t.Errorf("%s has %d bytes", path+suffix, len(data))
		}
		all += string(data)
	}
	want := "before\n"
	for i := range lines {
		want += fmt.Sprintf("%0*d\n", width-1, i)
	}
	if want += "out\ncrash\n"; all != want {
		t.Errorf("%d bytes, want %d; begins %.50q, ends %q", len(all), len(want), all, all[max(0, len(all)-20):])
	}
	if _, err := os.Stat(path + ".4"); err == nil {
		t.Error("a file too many")
	}
	if _, err := OpenFile(filepath.Join(path, "x")); err == nil || !strings.Contains(err.Error(), "open the log") {
		t.Errorf("%v", err)
	}
}
