package runtime

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"kedge/internal/atomicfile"
)

// progressInterval is the interval between progress messages of a long import.
const progressInterval = 5 * time.Second

// Images imports the archives and the OCI layouts in the images folder, as a component that starts after Runtime. The folder is
// authoritative: an image that was removed by hand is imported again at the next start, and an image whose
// archive was removed is unpinned.
type Images struct {
	cfg Config
	log *slog.Logger
}

// NewImages returns the component for the node that cfg describes.
func NewImages(cfg Config, log *slog.Logger) *Images {
	return &Images{cfg: cfg, log: log.With("component", "images")}
}

// Name implements lifecycle.Component.
func (m *Images) Name() string { return "images" }

// Run imports new archives and then waits for ctx. It reports a broken archive, continues with the others, and
// tries it again at the next start. It calls ready when every archive was tried. The kubelet need not wait for
// that: a pod waits for its image.
func (m *Images) Run(ctx context.Context, ready func()) error {
	if err := m.importAll(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	if ctx.Err() == nil {
		ready()
	}
	m.watchImages(ctx)
	return nil
}

// importRecord is the record of an imported archive.
type importRecord struct {
	Size    int64     `json:"size"`
	ModTime time.Time `json:"modTime"`
	Inode   uint64    `json:"inode,omitempty"`
	Changed time.Time `json:"changed,omitzero"` // ctime, which only the kernel sets
	SHA256  string    `json:"sha256"`
	Images  []string  `json:"images,omitempty"`
	// Problem is the error text for an archive that cannot be used. It is valid as long as the file is the
	// same, so that such a file is read once and not at every start.
	Problem string `json:"problem,omitempty"`
}

func (m *Images) recordFile() string { return filepath.Join(m.cfg.root(), "imported.json") }

func (m *Images) importAll(ctx context.Context) error {
	dir := m.cfg.imagesDir()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	before := m.readRecords()
	now := map[string]importRecord{}
	return withClient(m.cfg.Socket(), func(client *containerd.Client) error {
		ctx := namespaces.WithNamespace(ctx, criNamespace)
		if err := m.restoreImages(ctx, client); err != nil {
			return fmt.Errorf("restore images: %w", err)
		}
		for _, e := range entries {
			path, load := filepath.Join(dir, e.Name()), m.importFile
			switch {
			case e.IsDir() && isLayout(path):
				load = m.importLayout
			case !isArchive(e.Name()) || e.IsDir():
				continue
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			old, known := before[e.Name()]
			rec, err := load(ctx, client, path, old, known)
			if rec != nil {
				now[e.Name()] = *rec
			} else if known {
				now[e.Name()] = old // images of the previous version stay pinned
			}
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				m.log.Error(err.Error())
			}
			// The records are written after each archive, so that a power failure does not repeat all imports.
			if err := m.writeRecords(before, now); err != nil {
				return err
			}
		}
		if err := m.unpinRemoved(ctx, client, before, now); err != nil {
			return err
		}
		return m.writeRecords(nil, now)
	})
}

// importFile imports one archive unless its record is valid and its images exist. It returns the new record, or
// nil if there is none.
func (m *Images) importFile(ctx context.Context, client *containerd.Client, path string, old importRecord, known bool) (*importRecord, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	present := known && m.present(ctx, client, old)
	seen := recordOf(info)
	if present && seen.sameFile(old) {
		return &old, old.problem(path)
	}
	sum := sha256.New()
	if present && info.Size() == old.Size {
		// The file may have been copied again or touched.
		if _, err := io.Copy(sum, f); err != nil {
			return nil, err
		}
		if hex.EncodeToString(sum.Sum(nil)) == old.SHA256 {
			old.ModTime, old.Inode, old.Changed = seen.ModTime, seen.Inode, seen.Changed
			return &old, old.problem(path)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		sum.Reset()
	}

	begun := time.Now()
	m.log.Info("importing images", keyPath, path, "bytes", info.Size())
	r := &progressReader{r: f, sum: sum, total: info.Size(), next: begun.Add(progressInterval), report: func(percent int64) {
		m.log.Info("importing images", keyPath, path, "percent", percent)
	}}
	snapshotter, err := snapshotterOf(ctx, client)
	if err != nil {
		return nil, err
	}
	if err := snapshotter.fits(filepath.Base(path), info.Size()); err != nil {
		return nil, err
	}
	names, err := importArchive(ctx, client, snapshotter, filepath.Base(path), r)
	var problem *archiveError
	if err != nil && !errors.As(err, &problem) {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	for _, n := range names {
		if err := waitForCRI(ctx, client, n); err != nil {
			return nil, err
		}
	}
	rec := seen
	rec.SHA256, rec.Images = hex.EncodeToString(sum.Sum(nil)), names
	if problem != nil {
		rec.Problem = problem.text
		return &rec, problem
	}
	m.log.Info("imported images", keyPath, path, "images", names, keyElapsed, time.Since(begun).Round(time.Millisecond))
	return &rec, nil
}

// recordOf returns the record of a file's metadata, without its content.
func recordOf(info fs.FileInfo) importRecord {
	r := importRecord{Size: info.Size(), ModTime: info.ModTime()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		r.Inode, r.Changed = st.Ino, time.Unix(st.Ctim.Unix())
	}
	return r
}

// sameFile reports whether a file is the imported file and was not written since. Size and modification time
// are not sufficient: copying can preserve both.
func (r importRecord) sameFile(old importRecord) bool {
	return r.Size == old.Size && r.ModTime.Equal(old.ModTime) && r.Inode == old.Inode && r.Changed.Equal(old.Changed)
}

func (r importRecord) problem(path string) error {
	if r.Problem == "" {
		return nil
	}
	return &archiveError{filepath.Base(path), r.Problem}
}

// present reports whether containerd still has all images of an archive.
func (m *Images) present(ctx context.Context, client *containerd.Client, rec importRecord) bool {
	for _, n := range rec.Images {
		if _, err := client.ImageService().Get(ctx, n); err != nil {
			return false
		}
	}
	return len(rec.Images) > 0 || rec.Problem != ""
}

// unpinRemoved unpins images that no archive in the folder contains any more, so that the kubelet may remove them
// when the disk fills up.
func (m *Images) unpinRemoved(ctx context.Context, client *containerd.Client, before, now map[string]importRecord) error {
	kept := map[string]bool{}
	for _, rec := range now {
		for _, n := range rec.Images {
			kept[n] = true
		}
	}
	for file, rec := range before {
		for _, n := range rec.Images {
			if kept[n] {
				continue
			}
			img := images.Image{Name: n, Labels: map[string]string{labelPinned: ""}}
			if _, err := client.ImageService().Update(ctx, img, "labels."+labelPinned); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("unpin %s: %w", n, err)
			}
			m.log.Info("image unpinned: its archive was removed or no longer contains it", keyImage, n, keyPath, file)
		}
	}
	return nil
}

// readRecords returns the import records. If they cannot be read, all archives are imported again, without
// other damage.
func (m *Images) readRecords() map[string]importRecord {
	records := map[string]importRecord{}
	data, err := os.ReadFile(m.recordFile())
	if err == nil {
		err = json.Unmarshal(data, &records)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn("the record of imported images cannot be read; importing all archives", keyPath, m.recordFile(), keyError, err)
		return map[string]importRecord{}
	}
	return records
}

// writeRecords stores now, and the records of before for archives that are not in now.
func (m *Images) writeRecords(before, now map[string]importRecord) error {
	all := map[string]importRecord{}
	for k, v := range before {
		all[k] = v
	}
	for k, v := range now {
		all[k] = v
	}
	data, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(m.recordFile()); err == nil && bytes.Equal(old, data) {
		return nil // saves a write at every start
	}
	return atomicfile.Write(m.recordFile(), data, 0o600)
}

// progressReader hashes the data read from r and reports the progress at intervals.
type progressReader struct {
	r      io.Reader
	sum    hash.Hash
	total  int64
	read   int64
	next   time.Time
	report func(percent int64)
}

func (p *progressReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.sum.Write(b[:n])
	p.read += int64(n)
	if now := time.Now(); now.After(p.next) && p.total > 0 {
		p.next = now.Add(progressInterval)
		p.report(p.read * 100 / p.total)
	}
	return n, err
}
