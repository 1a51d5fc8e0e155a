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
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"kedge/internal/atomicfile"
)

// progressEvery is how often a long import says how far it is.
const progressEvery = 5 * time.Second

// Images imports the archives in the images folder, as a component that comes after
// Runtime. The folder is the truth: an image that was removed by hand comes back at
// the next start, and one whose archive is gone is no longer pinned.
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

// Run imports what is new and then waits for ctx. A broken archive is reported and
// passed over; it is tried again at the next start. ready is called when every
// archive was tried. The kubelet need not wait for it: a pod that comes first waits
// for its image.
func (m *Images) Run(ctx context.Context, ready func()) error {
	if err := m.importAll(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	if ctx.Err() == nil {
		ready()
	}
	<-ctx.Done()
	return nil
}

// importRecord is what is remembered of an archive that was imported.
type importRecord struct {
	Size    int64     `json:"size"`
	ModTime time.Time `json:"modTime"`
	SHA256  string    `json:"sha256"`
	Images  []string  `json:"images,omitempty"`
	// Problem is the sentence about an archive that cannot be used. It holds for as
	// long as the file is the same, so that such a file is read once and not at
	// every start.
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
		for _, e := range entries {
			if !isArchive(e.Name()) || e.IsDir() {
				continue
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
			old, known := before[e.Name()]
			rec, err := m.importFile(ctx, client, filepath.Join(dir, e.Name()), old, known)
			if rec != nil {
				now[e.Name()] = *rec
			} else if known {
				now[e.Name()] = old // what it held before is still wanted
			}
			if err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				m.log.Error(err.Error())
			}
			// After each: a machine that loses power in a long row does not begin anew.
			if err := m.writeRecords(before, now); err != nil {
				return err
			}
		}
		if err := m.unpinGone(ctx, client, before, now); err != nil {
			return err
		}
		return m.writeRecords(nil, now)
	})
}

// importFile imports one archive unless it is known and its images are there. It
// returns what is to be remembered, if anything.
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
	if present && info.Size() == old.Size && info.ModTime().Equal(old.ModTime) {
		return &old, old.problem(path)
	}
	sum := sha256.New()
	if present && info.Size() == old.Size {
		// Copied again, perhaps, or touched.
		if _, err := io.Copy(sum, f); err != nil {
			return nil, err
		}
		if hex.EncodeToString(sum.Sum(nil)) == old.SHA256 {
			old.ModTime = info.ModTime()
			return &old, old.problem(path)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
		sum.Reset()
	}

	begun := time.Now()
	m.log.Info("importing images", keyPath, path, "bytes", info.Size())
	r := &progressReader{r: f, sum: sum, total: info.Size(), next: begun.Add(progressEvery), report: func(percent int64) {
		m.log.Info("importing images", keyPath, path, "percent", percent)
	}}
	snapshotter, err := snapshotterOf(ctx, client)
	if err != nil {
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
		if err := untilCRIHas(ctx, client, n); err != nil {
			return nil, err
		}
	}
	rec := importRecord{Size: info.Size(), ModTime: info.ModTime(), SHA256: hex.EncodeToString(sum.Sum(nil)), Images: names}
	if problem != nil {
		rec.Problem = problem.text
		return &rec, problem
	}
	m.log.Info("imported images", keyPath, path, "images", names, keyElapsed, time.Since(begun).Round(time.Millisecond))
	return &rec, nil
}

func (r importRecord) problem(path string) error {
	if r.Problem == "" {
		return nil
	}
	return &archiveError{filepath.Base(path), r.Problem}
}

// present reports whether containerd still has all that an archive gave it.
func (m *Images) present(ctx context.Context, client *containerd.Client, rec importRecord) bool {
	for _, n := range rec.Images {
		if _, err := client.ImageService().Get(ctx, n); err != nil {
			return false
		}
	}
	return len(rec.Images) > 0 || rec.Problem != ""
}

// unpinGone lets go of the images of archives that are no longer in the folder, so
// that the kubelet may remove them when the disk fills up.
func (m *Images) unpinGone(ctx context.Context, client *containerd.Client, before, now map[string]importRecord) error {
	kept := map[string]bool{}
	for _, rec := range now {
		for _, n := range rec.Images {
			kept[n] = true
		}
	}
	for file, rec := range before {
		if _, ok := now[file]; ok {
			continue
		}
		for _, n := range rec.Images {
			if kept[n] {
				continue
			}
			img := images.Image{Name: n, Labels: map[string]string{labelPinned: ""}}
			if _, err := client.ImageService().Update(ctx, img, "labels."+labelPinned); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("unpin %s: %w", n, err)
			}
			m.log.Info("image is no longer pinned, its archive is gone", keyImage, n, keyPath, file)
		}
	}
	return nil
}

// readRecords returns what was remembered. A record that cannot be read costs an
// import, nothing else.
func (m *Images) readRecords() map[string]importRecord {
	records := map[string]importRecord{}
	data, err := os.ReadFile(m.recordFile())
	if err == nil {
		err = json.Unmarshal(data, &records)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		m.log.Warn("record of imported images cannot be read, importing all", keyPath, m.recordFile(), keyError, err)
		return map[string]importRecord{}
	}
	return records
}

// writeRecords remembers now, and before where now says nothing yet.
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
		return nil // spares the disk a write at every start
	}
	return atomicfile.Write(m.recordFile(), data, 0o600)
}

// progressReader hashes what is read and reports how much that is, now and then.
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
		p.next = now.Add(progressEvery)
		p.report(p.read * 100 / p.total)
	}
	return n, err
}
