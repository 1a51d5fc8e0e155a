package runtime

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/klauspost/compress/zstd"
)

// fakePayload is a payload whose programs are these texts.
func fakePayload(t *testing.T, text string) fstest.MapFS {
	t.Helper()
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer enc.Close()
	files := fstest.MapFS{}
	var entries []payloadEntry
	for _, name := range []string{programShim, programRunc, programPause} {
		data := []byte(name + text)
		sum := sha256.Sum256(data)
		files[name+".zst"] = &fstest.MapFile{Data: enc.EncodeAll(data, nil)}
		entries = append(entries, payloadEntry{Name: name, Size: int64(len(data)), SHA256: hex.EncodeToString(sum[:])})
	}
	manifest, err := json.Marshal(entries)
	if err != nil {
		t.Fatal(err)
	}
	files["manifest.json.zst"] = &fstest.MapFile{Data: enc.EncodeAll(manifest, nil)}
	return files
}

func TestUnpack(t *testing.T) {
	root := filepath.Join(t.TempDir(), "runtime")
	p, err := openPayload(fakePayload(t, "1"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := p.unpack(root)
	if err != nil {
		t.Fatal(err)
	}
	shim := filepath.Join(dir, programShim)
	info, err := os.Stat(shim)
	if err != nil || info.Mode().Perm() != 0o755 {
		t.Fatalf("shim is %v, %v", info, err)
	}

	// Again: the same file. Damaged: a new one.
	if again, err := p.unpack(root); err != nil || again != dir {
		t.Errorf("second time: %s, %v", again, err)
	}
	if now, _ := os.Stat(shim); !os.SameFile(info, now) {
		t.Error("unpacked again although nothing had changed")
	}
	if err := os.Truncate(shim, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := p.unpack(root); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(shim); string(data) != programShim+"1" {
		t.Errorf("damaged shim is now %q", data)
	}

	newer, err := openPayload(fakePayload(t, "2"))
	if err != nil {
		t.Fatal(err)
	}
	next, err := newer.unpack(root)
	if err != nil || next == dir {
		t.Fatalf("another version went to %s, %v", next, err)
	}
	left, _ := os.ReadDir(root)
	if len(left) != 2 {
		t.Errorf("%v in %s, want two versions and nothing else", left, root)
	}
}

func TestPrunePayloads(t *testing.T) {
	root := filepath.Join(t.TempDir(), "runtime")
	state := t.TempDir()
	for _, name := range []string{"new", "running", "recorded", "old", ".unpack-1"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	bundle := filepath.Join(state, "io.containerd.runtime.v2.task/k8s.io/pod")
	if err := os.MkdirAll(bundle, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "shim-binary-path"), []byte(filepath.Join(root, "recorded", programShim)), 0o600); err != nil {
		t.Fatal(err)
	}
	// The test program itself, under the name of a shim.
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	running := filepath.Join(root, "running", programShim)
	if err := os.WriteFile(running, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(running, "-test.run=^TestSleepUntilKilled$")
	cmd.Env = append(os.Environ(), sleepEnv+"=1")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	if err := prunePayloads(root, filepath.Join(root, "new"), state); err != nil {
		t.Fatal(err)
	}
	var left []string
	entries, _ := os.ReadDir(root)
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if got := strings.Join(left, " "); got != "new recorded running" {
		t.Errorf("left are %s, want new recorded running", got)
	}
}

const sleepEnv = "KEDGE_TEST_SLEEP"

// TestSleepUntilKilled is no test: TestPrunePayloads runs it as a process to be found.
func TestSleepUntilKilled(t *testing.T) {
	if os.Getenv(sleepEnv) != "" {
		select {}
	}
}

func TestPayloadProblems(t *testing.T) {
	_, err := openPayload(fstest.MapFS{"README": {}})
	if !errors.Is(err, ErrNoPayload) {
		t.Errorf("without programs: %v", err)
	}
	files := fakePayload(t, "1")
	files[programRunc+".zst"] = files[programShim+".zst"]
	p, err := openPayload(files)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.unpack(t.TempDir()); err == nil || !strings.Contains(err.Error(), "does not match its manifest") {
		t.Errorf("with a wrong program: %v", err)
	}
}

func TestPauseImageIsReproducible(t *testing.T) {
	a, err := newPauseImage([]byte("program"))
	if err != nil {
		t.Fatal(err)
	}
	b, _ := newPauseImage([]byte("program"))
	c, _ := newPauseImage([]byte("another"))
	if a.name != b.name || a.name == c.name {
		t.Errorf("names are %s, %s and, for another program, %s", a.name, b.name, c.name)
	}
}

// TestProgramsAreStatic: what is carried runs on any Linux of its architecture, whatever
// C library is there.
func TestProgramsAreStatic(t *testing.T) {
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		p, err := openPayload(os.DirFS(filepath.Join("payload", arch)))
		if errors.Is(err, ErrNoPayload) && arch != goruntime.GOARCH {
			continue // nobody has built it
		}
		t.Run(arch, func(t *testing.T) {
			if errors.Is(err, ErrNoPayload) {
				t.Skip("not built; make check does: make payload")
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{programShim, programRunc, programPause} {
				var program bytes.Buffer
				if err := p.program(&program, name); err != nil {
					t.Fatal(err)
				}
				f, err := elf.NewFile(bytes.NewReader(program.Bytes()))
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if f.Machine != machine {
					t.Errorf("%s is for %s", name, f.Machine)
				}
				for _, part := range f.Progs {
					if part.Type == elf.PT_INTERP {
						t.Errorf("%s wants a dynamic linker of the host", name)
					}
				}
			}
		})
	}
}
