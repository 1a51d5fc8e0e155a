package packedprogram

import (
	"bytes"
	"errors"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func program(size int) []byte {
	r := rand.New(rand.NewPCG(1, 2))
	out := make([]byte, size)
	for i := range out {
		out[i] = byte(r.IntN(8)) // compresses, but not to nothing
	}
	return out
}

func unpack(t *testing.T, dir string) ([]byte, error) {
	t.Helper()
	fsys := os.DirFS(dir)
	m, err := Read(fsys, ".")
	if err != nil {
		return nil, err
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Unpack(fsys, ".", m, f); err != nil {
		return nil, err
	}
	return os.ReadFile(f.Name())
}

func TestRoundTrip(t *testing.T) {
	for _, size := range []int{1, pieceSize, 2*pieceSize + 12345} {
		dir, want := t.TempDir(), program(size)
		m, err := Pack(dir, want, zstd.SpeedFastest)
		if err != nil {
			t.Fatal(err)
		}
		if m.Size != int64(size) || len(m.ID()) != 16 {
			t.Errorf("manifest %+v", m)
		}
		got, err := unpack(t, dir)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes: got %d, %v", size, len(got), err)
		}
	}
}

func TestRepackLeavesNothingOld(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int{2*pieceSize + 1, 100} {
		if _, err := Pack(dir, program(size), zstd.SpeedFastest); err != nil {
			t.Fatal(err)
		}
	}
	if pieces, _ := filepath.Glob(filepath.Join(dir, "*.zst")); len(pieces) != 1 {
		t.Errorf("pieces %v", pieces)
	}
}

// Releases of one commit are equal, so compression must not depend on the number of processors or on the order of the pieces.
func TestPackIsReproducible(t *testing.T) {
	want := bytes.Repeat(program(1<<16), pieceSize>>16+1) // two pieces, which compress fast
	var first map[string]string
	for _, processors := range []int{1, 8} {
		before := runtime.GOMAXPROCS(processors)
		dir := t.TempDir()
		_, err := Pack(dir, want, zstd.SpeedBetterCompression)
		runtime.GOMAXPROCS(before)
		if err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, f := range files {
			content, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			got[filepath.Base(f)] = string(content)
		}
		if first == nil {
			first = got
		} else if !maps.Equal(first, got) {
			t.Errorf("with %d processors the packed program differs", processors)
		}
	}
}

func TestDamageIsNoticed(t *testing.T) {
	dir := t.TempDir()
	if _, err := unpack(t, dir); !errors.Is(err, ErrMissing) {
		t.Errorf("nothing packed: %v", err)
	}
	if _, err := Pack(dir, program(pieceSize+100), zstd.SpeedFastest); err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, pieceName(0))
	good, _ := os.ReadFile(name)
	bad := bytes.Clone(good)
	bad[len(bad)/2] ^= 1
	os.WriteFile(name, bad, 0o644)
	if _, err := unpack(t, dir); err == nil {
		t.Error("a flipped bit was not noticed")
	}
	os.WriteFile(name, good[:len(good)/2], 0o644)
	if _, err := unpack(t, dir); err == nil {
		t.Error("a short piece was not noticed")
	}
}
