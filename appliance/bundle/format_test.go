package bundle

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestBundleIsReadAsItWasWritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	want := simple(t).write(t, path)
	b := open(t, path)
	if b.Index.ID() != want.ID() || len(b.Index.Images) != 1 || b.Index.Images[0].Name != "docker.io/library/one:1" || b.Index.Config != "node-label: [a=b]\n" {
		t.Errorf("%+v", b.Index)
	}
	if err := b.Verify(t.Context(), nil); err != nil {
		t.Error(err)
	}
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o755 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	// The file begins with the executable, byte for byte.
	e, err := b.Executable("amd64")
	if err != nil || e.Offset != 0 || string(mustRead(t, path)[:e.Size]) != string(tinyELF(amd64, "the program")) {
		t.Errorf("executable %+v, %v", e, err)
	}
	if _, err := b.Executable("arm64"); !errors.As(err, new(*ArchitectureError)) {
		t.Errorf("another architecture: %v", err)
	}
	// The same contents make the same file.
	again := filepath.Join(t.TempDir(), "b")
	simple(t).write(t, again)
	if string(mustRead(t, again)) != string(mustRead(t, path)) {
		t.Error("a second bundle of the same contents differs")
	}
	// Nothing else is in the folder.
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("left beside the bundle: %v", entries)
	}
}

// TestEveryBitCounts flips each bit of a bundle: none goes unnoticed.
func TestEveryBitCounts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	m := simple(t)
	key := newKey(t)
	m.key = &key.secret
	m.write(t, path)
	whole := mustRead(t, path)
	for i := range whole {
		whole[i] ^= 1 << (i % 8)
		mustWrite(t, path, whole)
		err := check(path)
		if err == nil {
			t.Fatalf("a flipped bit in byte %d of %d went unnoticed", i, len(whole))
		}
		if strings.Contains(err.Error(), "\n") {
			t.Fatalf("byte %d: the error has several lines: %v", i, err)
		}
		whole[i] ^= 1 << (i % 8)
	}
	mustWrite(t, path, whole)
	if err := check(path); err != nil {
		t.Fatal(err)
	}
}

func TestCutOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	simple(t).write(t, path)
	whole := mustRead(t, path)
	program := len(tinyELF(amd64, "the program"))
	for n := range whole {
		mustWrite(t, path, whole[:n])
		err := check(path)
		switch {
		case n == program: // that is a kedge
			if !errors.Is(err, ErrNone) {
				t.Errorf("the executable alone: %v", err)
			}
		case err == nil || errors.Is(err, ErrNone):
			t.Errorf("cut off after %d of %d bytes: %v", n, len(whole), err)
		}
	}
	mustWrite(t, path, append(append([]byte{}, whole...), 0))
	if err := check(path); err == nil {
		t.Error("a byte was appended")
	}
}

func TestLyingIndex(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	for name, test := range map[string]struct {
		change func(x *Index)
		want   string
	}{
		"a part that is too long":        {func(x *Index) { x.Contents[0].Size++ }, "sizes"},
		"a part that is too short":       {func(x *Index) { x.Contents[0].Size-- }, "sizes"},
		"a part that is endless":         {func(x *Index) { x.Contents[0].Size = 1<<63 - 1 }, "sizes"},
		"a part before the file":         {func(x *Index) { x.Contents[0].Offset = -1 }, "sizes"},
		"a part of negative size":        {func(x *Index) { x.Contents[0].Size = -1 }, "not listed rightly"},
		"a part that is absent":          {func(x *Index) { x.Contents[0].Absent = true }, "missing"},
		"a part that is not listed":      {func(x *Index) { x.Contents = x.Contents[:len(x.Contents)-1] }, "sizes"},
		"a part twice":                   {func(x *Index) { x.Contents[1].SHA256 = x.Contents[0].SHA256 }, "twice"},
		"a hash that is none":            {func(x *Index) { x.Contents[0].SHA256 = "../../etc/passwd" }, "not listed rightly"},
		"no executable":                  {func(x *Index) { x.Executables = nil }, "no executable"},
		"an executable that is absent":   {func(x *Index) { x.Executables[0].Absent = true }, "missing"},
		"an architecture that is a path": {func(x *Index) { x.Executables[0].Architecture = "../amd64" }, "not listed rightly"},
		"a file outside":                 {func(x *Index) { x.Manifests[0].Name = "../../x.yaml" }, "cannot be the name"},
		"a hidden file":                  {func(x *Index) { x.Manifests[0].Name = ".x" }, "cannot be the name"},
		"a file twice":                   {func(x *Index) { x.Manifests = append(x.Manifests, x.Manifests[0]) }, "listed twice"},
		"a file without content":         {func(x *Index) { x.Charts = []Item{{"c.tgz", sumOf("other")}} }, "missing"},
		"an image twice":                 {func(x *Index) { x.Images = append(x.Images, x.Images[0]) }, "listed twice"},
		"an image without content":       {func(x *Index) { x.Images[0].Descriptor.Size++ }, "missing"},
		"an image with a short name":     {func(x *Index) { x.Images[0].Name = "one" }, "not the name of an image"},
		"an image with another digest":   {func(x *Index) { x.Images[0].Descriptor.Digest = "md5:00" }, "not a SHA-256"},
		"too many items":                 {func(x *Index) { x.Charts = make([]Item, maxItems) }, "at most"},
		"too many settings":              {func(x *Index) { x.Config = strings.Repeat(" ", maxConfig+1) }, "more than"},
		"another format":                 {func(x *Index) { x.Format = 2 }, "newer kedge"},
	} {
		simple(t).write(t, path)
		rewrite(t, path, test.change)
		err := check(path)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// rewrite replaces the index of a bundle, with a right trailer.
func rewrite(t *testing.T, path string, change func(*Index)) {
	t.Helper()
	b := open(t, path)
	change(b.Index)
	raw, err := json.Marshal(b.Index)
	if err != nil {
		t.Fatal(err)
	}
	whole := mustRead(t, path)
	at := len(whole) - trailerSize - len(b.raw) - len(b.signature)
	out := append(append([]byte{}, whole[:at]...), raw...)
	mustWrite(t, path, append(out, trailer{index: int64(len(raw)), sum: sha256.Sum256(raw)}.bytes()...))
}

func TestIndexIsBounded(t *testing.T) {
	for _, tr := range []trailer{{index: maxIndex + 1}, {signature: maxSignature + 1}, {index: 1000}, {index: -1}} {
		if _, err := parseTrailer(tr.bytes(), 500); err == nil {
			t.Errorf("%+v was accepted", tr)
		}
	}
}

// TestHeadChoosesTheExecutable runs the script at the begin of bundles for several architectures with this machine's shell.
func TestHeadChoosesTheExecutable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	m := simple(t)
	m.layouts = nil
	// The kernel runs scripts too, which the test's bundle has in place of executables.
	script := func(arch string) []byte {
		return []byte(fmt.Sprintf("#!/bin/sh\necho \"%s $1 $KEDGE_BUNDLE $TMPDIR\"\nexit 7\n", arch))
	}
	m.programs = map[string][]byte{"amd64": script("amd64"), "arm64": script("arm64")}
	m.write(t, path)
	if err := check(path); err != nil {
		t.Fatal(err)
	}
	for machine, arch := range map[string]string{"x86_64": "amd64", "aarch64": "arm64"} {
		out, code, tmp := runAs(t, path, machine, "version")
		if want := arch + " version " + path + " " + tmp + "\n"; out != want || code != 7 {
			t.Errorf("%s: %q, exit code %d, want %q", machine, out, code, want)
		}
		if left, _ := os.ReadDir(tmp); len(left) > 0 {
			t.Errorf("%s: left in the temporary folder: %v", machine, left)
		}
	}
	whole := mustRead(t, path)
	mustWrite(t, path, whole[:open(t, path).Index.Head.Size+5])
	if out, code, _ := runAs(t, path, "x86_64", "version"); code != 1 || !strings.Contains(out, "is cut off; copy it again") {
		t.Errorf("cut off: %q, exit code %d", out, code)
	}
	mustWrite(t, path, whole)
	out, code, _ := runAs(t, path, "riscv64", "version")
	if code != 78 || !strings.Contains(out, "no executable for riscv64") {
		t.Errorf("another machine: %q, exit code %d", out, code)
	}
}
