// Package packedprogram is the form in which the large program travels inside the launcher:
// cut into pieces that are compressed independently, so that several processors can write
// and read them. It also keeps the folders of unpacked programs.
//
// The build packs (scripts/pack), the launcher unpacks, and package main keeps its own
// folder. The package is not for images or other data of users.
package packedprogram

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// pieceSize is the size of a piece before compression. Smaller pieces compress worse, and larger
// pieces leave processors idle at the end.
const pieceSize = 8 << 20

// window bounds the memory that unpacking a piece needs.
const window = 4 << 20

const manifestName = "manifest.json"

// ErrMissing is wrapped when a folder holds no packed program.
var ErrMissing = errors.New("built without its program; run make build")

// Manifest describes a packed program.
type Manifest struct {
	SHA256 string `json:"sha256"` // of the program
	Size   int64  `json:"size"`
	Pieces int    `json:"pieces"`
}

// ID identifies the program. It is the name of its folder.
func (m Manifest) ID() string { return m.SHA256[:16] }

func pieceName(i int) string { return fmt.Sprintf("piece-%03d.zst", i) }

// Pack writes program into dir and removes the files of an earlier call.
func Pack(dir string, program []byte, level zstd.EncoderLevel) (Manifest, error) {
	old, err := filepath.Glob(filepath.Join(dir, "*.zst"))
	if err != nil {
		return Manifest{}, err
	}
	for _, name := range append(old, filepath.Join(dir, manifestName)) {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return Manifest{}, err
		}
	}
	sum := sha256.Sum256(program)
	m := Manifest{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(program)), Pieces: (len(program) + pieceSize - 1) / pieceSize}
	err = parallel(m.Pieces, func(i int) error {
		enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithWindowSize(window), zstd.WithEncoderConcurrency(1))
		if err != nil {
			return err
		}
		defer enc.Close()
		part := program[i*pieceSize : min((i+1)*pieceSize, len(program))]
		return os.WriteFile(filepath.Join(dir, pieceName(i)), enc.EncodeAll(part, nil), 0o644)
	})
	if err != nil {
		return m, err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return m, err
	}
	return m, os.WriteFile(filepath.Join(dir, manifestName), text, 0o644)
}

// Read returns the manifest of the program packed in dir of fsys.
func Read(fsys fs.FS, dir string) (Manifest, error) {
	var m Manifest
	text, err := fs.ReadFile(fsys, path.Join(dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return m, ErrMissing
	}
	if err != nil {
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("read the manifest of the packed program: %w", err)
	}
	return m, nil
}

// Unpack writes the program to f and verifies each piece's checksum. It does not sync the file.
func Unpack(fsys fs.FS, dir string, m Manifest, f *os.File) error {
	if err := f.Truncate(m.Size); err != nil {
		return err
	}
	return parallel(m.Pieces, func(i int) error {
		data, err := fs.ReadFile(fsys, path.Join(dir, pieceName(i)))
		if err != nil {
			return err
		}
		dec, err := zstd.NewReader(bytes.NewReader(data), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(window))
		if err != nil {
			return err
		}
		defer dec.Close()
		n, err := io.Copy(io.NewOffsetWriter(f, int64(i)*pieceSize), dec)
		if err != nil {
			return fmt.Errorf("piece %d: %w", i, err)
		}
		if want := min(pieceSize, m.Size-int64(i)*pieceSize); n != want {
			return fmt.Errorf("piece %d has %d bytes, want %d", i, n, want)
		}
		return nil
	})
}

// parallel calls f for 0 to n-1 on all processors.
func parallel(n int, f func(int) error) error {
	var wg sync.WaitGroup
	errs := make([]error, n)
	next := make(chan int)
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := range next {
				errs[i] = f(i)
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	return errors.Join(errs...)
}
