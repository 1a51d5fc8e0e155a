package bundle

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"aead.dev/minisign"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
)

// writer writes a bundle to a temporary file beside its path.
type writer struct {
	path  string
	f     *os.File
	at    int64
	index Index
	seen  map[string]bool // the contents in the index
}

// newWriter begins a bundle. A rename onto a device, such as /dev/null, would remove the device from the machine.
func newWriter(path string) (*writer, error) {
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		return nil, errorkind.Permanent(fmt.Errorf("%s is not a regular file; name another file for the bundle with --output", path))
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return nil, fmt.Errorf("the bundle %s cannot be written: %w", path, errors.Unwrap(err))
	}
	return &writer{path: path, f: f, index: Index{Format: format}, seen: map[string]bool{}}, nil
}

// abort removes the temporary file of a bundle that is not finished.
func (w *writer) abort() { _ = errors.Join(w.f.Close(), os.Remove(w.f.Name())) }

// append writes what r has, and returns where it lies.
func (w *writer) append(ctx context.Context, r io.Reader) (Part, error) {
	h := sha256.New()
	var n int64
	_, err := io.Copy(io.MultiWriter(w.f, h), Progress(nil).reader(ctx, r, &n, 0))
	if err != nil {
		return Part{}, err
	}
	p := Part{SHA256: hex.EncodeToString(h.Sum(nil)), Size: n, Offset: w.at}
	w.at += n
	return p, nil
}

// content writes a content with a known hash, unless it was written.
func (w *writer) content(ctx context.Context, sha string, open func() (io.ReadCloser, error)) error {
	if w.seen[sha] {
		return nil
	}
	r, err := open()
	if err != nil {
		return err
	}
	defer r.Close()
	p, err := w.append(ctx, r)
	if err != nil {
		return err
	}
	if p.SHA256 != sha {
		return fmt.Errorf("the part sha256:%s of an image is damaged, or was changed while it was read; save the image again", sha)
	}
	w.index.Contents, w.seen[sha] = append(w.index.Contents, p), true
	return nil
}

// absent lists a content that the base has.
func (w *writer) absent(p Part) {
	w.index.Contents, w.seen[p.SHA256] = append(w.index.Contents, Part{SHA256: p.SHA256, Size: p.Size, Absent: true}), true
}

// executables writes the begin of the file. Executables for several architectures, or none, need a script before them.
func (w *writer) executables(ctx context.Context, all []Executable, open func(Executable) io.Reader) error {
	present := 0
	for _, e := range all {
		if !e.Absent {
			present++
		}
	}
	if present != 1 || len(all) > 1 {
		head := headFor(all)
		p, err := w.append(ctx, head)
		if err != nil {
			return err
		}
		w.index.Head = &p
	}
	for _, e := range all {
		if e.Absent {
			w.index.Executables = append(w.index.Executables, Executable{e.Architecture, Part{SHA256: e.SHA256, Size: e.Size, Absent: true}})
			continue
		}
		p, err := w.append(ctx, open(e))
		if err != nil {
			return err
		}
		if p.Size != e.Size || e.SHA256 != "" && p.SHA256 != e.SHA256 {
			return fmt.Errorf("the executable for %s has changed while it was read", e.Architecture)
		}
		w.index.Executables = append(w.index.Executables, Executable{e.Architecture, p})
	}
	return nil
}

// finish writes index, signature and trailer, and gives the file its name.
func (w *writer) finish(key *minisign.PrivateKey) error {
	if err := w.index.check(w.at); err != nil {
		return fmt.Errorf("the bundle cannot be made: %w", err)
	}
	raw, err := json.Marshal(w.index)
	if err != nil {
		return err
	}
	if len(raw) > maxIndex {
		return fmt.Errorf("the bundle cannot be made: its index would have more than %d MiB", maxIndex>>20)
	}
	t := trailer{index: int64(len(raw))}
	both := raw
	if key != nil {
		signature, err := sign(raw, w.index.ID(), *key)
		if err != nil {
			return err
		}
		t.signature, both = int64(len(signature)), append(both, signature...)
	}
	t.sum = sha256.Sum256(both)
	if _, err := w.f.Write(append(both, t.bytes()...)); err != nil {
		return err
	}
	if err := w.f.Chmod(0o755); err != nil {
		return err
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	if err := w.f.Close(); err != nil {
		return err
	}
	if err := os.Rename(w.f.Name(), w.path); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(w.path))
}
