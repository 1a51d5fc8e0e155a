package runtime

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
	goruntime "runtime"
	"strings"

	"github.com/klauspost/compress/zstd"

	"kedge/internal/atomicfile"
)

// Programs that are embedded in the executable.
const (
	programShim  = "containerd-shim-runc-v2"
	programRunc  = "runc"
	programPause = "pause"
)

// ErrNoPayload is returned if the executable was linked before the embedded programs were built.
var ErrNoPayload = errors.New("built without its runtime payload; run make build")

// payload contains the programs that scripts/build-payload.sh built for one architecture.
type payload struct {
	files   fs.FS
	hash    string // short hash of all programs; it names the folder to which they are unpacked
	entries []payloadEntry
}

type payloadEntry struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// embeddedPayload opens the payload of this executable.
func embeddedPayload() (*payload, error) {
	files, err := fs.Sub(payloadFiles, path.Join("payload", goruntime.GOARCH))
	if err != nil {
		return nil, err
	}
	return openPayload(files)
}

func openPayload(files fs.FS) (*payload, error) {
	p := &payload{files: files}
	var manifest bytes.Buffer
	err := p.decompress(&manifest, "manifest.json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNoPayload
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(manifest.Bytes(), &p.entries); err != nil {
		return nil, fmt.Errorf("read the manifest of the runtime payload: %w", err)
	}
	for _, name := range []string{programShim, programRunc, programPause} {
		if _, err := p.entry(name); err != nil {
			return nil, err
		}
	}
	sum := sha256.Sum256(manifest.Bytes())
	p.hash = hex.EncodeToString(sum[:8])
	return p, nil
}

func (p *payload) entry(name string) (payloadEntry, error) {
	for _, e := range p.entries {
		if e.Name == name {
			return e, nil
		}
	}
	return payloadEntry{}, fmt.Errorf("runtime payload lacks %s; run make build", name)
}

// decompress writes one file of the payload to w as a stream: a node with 128 MB of memory cannot hold both
// programs.
func (p *payload) decompress(w io.Writer, name string) error {
	packed, err := p.files.Open(name + ".zst")
	if err != nil {
		return err
	}
	defer packed.Close()
	dec, err := zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		return err
	}
	defer dec.Close()
	if _, err := io.Copy(w, dec); err != nil {
		return fmt.Errorf("runtime payload %s: %w", name, err)
	}
	return nil
}

// program decompresses one program to w and checks it against the manifest.
func (p *payload) program(w io.Writer, name string) error {
	e, err := p.entry(name)
	if err != nil {
		return err
	}
	sum := sha256.New()
	if err := p.decompress(io.MultiWriter(w, sum), name); err != nil {
		return err
	}
	if hex.EncodeToString(sum.Sum(nil)) != e.SHA256 {
		return fmt.Errorf("runtime payload %s does not match its manifest; the executable is damaged", name)
	}
	return nil
}

// unpack writes shim and runc to root/<hash>, completely or not at all, and returns that folder. An existing
// folder is used only if its hashes are correct: after a power failure a file may be empty.
func (p *payload) unpack(root string) (string, error) {
	dir := filepath.Join(root, p.hash)
	if p.verify(dir) == nil {
		return dir, nil
	}
	if err := os.MkdirAll(root, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(root, ".unpack-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	for _, name := range []string{programShim, programRunc} {
		f, err := os.OpenFile(filepath.Join(tmp, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
		if err != nil {
			return "", err
		}
		if err := errors.Join(p.program(f, name), f.Sync(), f.Close()); err != nil {
			return "", err
		}
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	// Running programs keep their inodes, so a damaged folder can be removed even while a shim from it runs.
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", err
	}
	return dir, atomicfile.SyncDir(root)
}

func (p *payload) verify(dir string) error {
	for _, name := range []string{programShim, programRunc} {
		e, err := p.entry(name)
		if err != nil {
			return err
		}
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		sum := sha256.New()
		_, err = io.Copy(sum, f)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		if hex.EncodeToString(sum.Sum(nil)) != e.SHA256 {
			return fmt.Errorf("%s differs from the embedded program", filepath.Join(dir, name))
		}
	}
	return nil
}

// prunePayloads removes the folders of other payloads, except keep and those whose programs a process runs or a
// bundle under state refers to.
func prunePayloads(root, keep, state string) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	used := map[string]bool{filepath.Base(keep): true}
	mark := func(program string) {
		if rel, err := filepath.Rel(root, program); err == nil {
			used[strings.SplitN(rel, string(filepath.Separator), 2)[0]] = true
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return err
	}
	for _, exe := range processes {
		if target, err := os.Readlink(exe); err == nil {
			mark(target)
		}
	}
	bundles, err := filepath.Glob(filepath.Join(state, "io.containerd.runtime.v2.task", "*", "*", "shim-binary-path"))
	if err != nil {
		return err
	}
	for _, b := range bundles {
		if text, err := os.ReadFile(b); err == nil {
			mark(strings.TrimSpace(string(text)))
		}
	}
	var errs []error
	for _, e := range entries {
		if !used[e.Name()] {
			errs = append(errs, os.RemoveAll(filepath.Join(root, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// writeFileSync writes a file and syncs it to disk.
func writeFileSync(name string, data []byte, mode os.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}
