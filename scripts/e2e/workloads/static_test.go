package workloads

import (
	"debug/elf"
	"path/filepath"
	goruntime "runtime"
	"testing"

	"kedge/scripts/e2e/harness"
)

// TestProgramsAreStatic: the executable and all that a node has unpacked run on any Linux
// of their architecture, whatever C library is there.
func TestProgramsAreStatic(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[goruntime.GOARCH]
	programs := []string{harness.Binary()}
	for _, pattern := range []string{"program/*/kedge", "runtime/*/containerd-shim-runc-v2", "runtime/*/runc"} {
		found, err := filepath.Glob(filepath.Join(n.DataDir(), pattern))
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %v, %v", pattern, found, err)
		}
		programs = append(programs, found...)
	}
	for _, name := range programs {
		f, err := elf.Open(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		defer f.Close()
		if f.Machine != machine {
			t.Errorf("%s is for %s", name, f.Machine)
		}
		for _, part := range f.Progs {
			if part.Type == elf.PT_INTERP {
				t.Errorf("%s wants a dynamic linker of the host", name)
			}
		}
	}
}
