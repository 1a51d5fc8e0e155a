package runtime

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kedge/internal/atomicfile"
)

// maxLayoutIndex bounds the size of index.json of an OCI layout, in bytes.
const maxLayoutIndex = 4 << 20

// isLayout reports whether a folder is an OCI layout: it has that file and an index. While a layout is being copied the index
// may be missing.
func isLayout(dir string) bool {
	for _, name := range []string{v1.ImageLayoutFile, v1.ImageIndexFile} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || !st.Mode().IsRegular() {
			return false
		}
	}
	return true
}

// importLayout imports the images of an OCI layout unless its record is valid and its images exist. Only blobs that containerd
// lacks are copied. The record is that of index.json, which has the digests of everything else.
func (m *Images) importLayout(ctx context.Context, client *containerd.Client, dir string, old importRecord, known bool) (*importRecord, error) {
	file := filepath.Join(dir, v1.ImageIndexFile)
	data, err := atomicfile.ReadSmall(file, maxLayoutIndex)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	rec := recordOf(info)
	rec.SHA256 = digest.FromBytes(data).Encoded()
	if known && rec.SHA256 == old.SHA256 && m.present(ctx, client, old) {
		rec.Images, rec.Problem = old.Images, old.Problem
		return &rec, old.problem(dir)
	}
	var index v1.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	begun := time.Now()
	l := layoutImport{m: m, client: client, dir: dir, next: begun.Add(progressInterval)}
	rec.Images, err = l.run(ctx, index)
	var problem *archiveError
	if err != nil && !errors.As(err, &problem) {
		return nil, err
	}
	for _, n := range rec.Images {
		if err := waitForCRI(ctx, client, n); err != nil {
			return nil, err
		}
	}
	if problem != nil {
		rec.Problem = problem.text
		return &rec, problem
	}
	m.log.Info("imported images", keyPath, dir, "images", rec.Images, "copied", l.copied, keyElapsed, time.Since(begun).Round(time.Millisecond))
	return &rec, nil
}

// layoutImport is one import of an OCI layout.
type layoutImport struct {
	m      *Images
	client *containerd.Client
	dir    string

	copied, total int64 // bytes
	next          time.Time
}

// run copies the blobs of all images for this machine's platform, and creates the images. As for an archive, the import ends
// before the disk is full.
func (l *layoutImport) run(ctx context.Context, index v1.Index) ([]string, error) {
	snapshotter, err := snapshotterOf(ctx, l.client)
	if err != nil {
		return nil, err
	}
	missing, err := l.missing(ctx, index)
	if err != nil {
		return nil, err
	}
	for _, d := range missing {
		l.total += d.Size
	}
	name := filepath.Base(l.dir)
	if err := snapshotter.fits(name, l.total); err != nil {
		return nil, err
	}
	ctx, stop := watchSpace(ctx, snapshotter.dir)
	defer stop()
	ctx, done, err := l.client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	defer done(context.WithoutCancel(ctx))
	if l.total > 0 {
		l.m.log.Info("importing images", keyPath, l.dir, "bytes", l.total)
	}
	names, err := func() ([]string, error) {
		for _, d := range missing {
			if err := l.copy(ctx, d); err != nil {
				return nil, err
			}
		}
		return nameImages(ctx, l.client, snapshotter, name, index)
	}()
	var full *fullError
	if err != nil && errors.As(context.Cause(ctx), &full) {
		err = full.of(name) // the cause of the cancellation is the error to report
	}
	return names, err
}

// missing returns the parts of the images for this platform that containerd does not have. Blobs that the layout does not
// have either are left out: an image with parts for other platforms is complete without these.
func (l *layoutImport) missing(ctx context.Context, index v1.Index) (all []v1.Descriptor, err error) {
	seen := map[digest.Digest]bool{}
	children := images.FilterPlatforms(images.ChildrenHandler(layoutFiles(l.dir)), platforms.Default())
	walk := func(ctx context.Context, d v1.Descriptor) ([]v1.Descriptor, error) {
		if seen[d.Digest] {
			return nil, images.ErrSkipDesc
		}
		seen[d.Digest] = true
		_, err := os.Stat(layoutFiles(l.dir).path(d.Digest))
		if errors.Is(err, fs.ErrNotExist) {
			return nil, images.ErrSkipDesc
		}
		if err != nil {
			return nil, err
		}
		if _, err := l.client.ContentStore().Info(ctx, d.Digest); errdefs.IsNotFound(err) {
			all = append(all, d)
		} else if err != nil {
			return nil, err
		}
		return children.Handle(ctx, d)
	}
	if err := images.Walk(ctx, images.HandlerFunc(walk), index.Manifests...); err != nil {
		return nil, readError(filepath.Base(l.dir), err)
	}
	return all, nil
}

// copy copies a blob into containerd's store, which verifies its digest. The layout's file then becomes a link to
// containerd's, so that the content is on the disk once.
func (l *layoutImport) copy(ctx context.Context, d v1.Descriptor) error {
	files := layoutFiles(l.dir)
	r, err := files.ReaderAt(ctx, d)
	if err != nil {
		return err
	}
	defer r.Close()
	err = content.WriteBlob(ctx, l.client.ContentStore(), "layout-"+d.Digest.String(), l.progress(content.NewReader(r)), d)
	if errdefs.IsFailedPrecondition(err) { // another digest or size
		return &archiveError{filepath.Base(l.dir), fmt.Sprintf("has the damaged part %s; copy it again, and remove that part of a bundle before you install it again", d.Digest)}
	}
	if err != nil {
		return err
	}
	held := filepath.Join(l.m.cfg.root(), "io.containerd.content.v1.content", "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded())
	tmp := files.path(d.Digest) + ".link"
	// Without links, as between file systems, the content is there twice, which is no error.
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.Link(held, tmp); err != nil {
		return nil
	}
	if err := os.Rename(tmp, files.path(d.Digest)); err != nil {
		_ = os.Remove(tmp)
	}
	return nil
}

// progress counts what is read, and logs it at intervals.
func (l *layoutImport) progress(r io.Reader) io.Reader {
	return progressFunc(func(b []byte) (int, error) {
		n, err := r.Read(b)
		l.copied += int64(n)
		if now := time.Now(); now.After(l.next) && l.total > 0 {
			l.next = now.Add(progressInterval)
			l.m.log.Info("importing images", keyPath, l.dir, "percent", l.copied*100/l.total)
		}
		return n, err
	})
}

type progressFunc func([]byte) (int, error)

func (f progressFunc) Read(b []byte) (int, error) { return f(b) }

// layoutFiles reads the blobs of an OCI layout in a folder.
type layoutFiles string

func (l layoutFiles) path(d digest.Digest) string {
	return filepath.Join(string(l), "blobs", d.Algorithm().String(), d.Encoded())
}

// ReaderAt implements [content.Provider].
func (l layoutFiles) ReaderAt(_ context.Context, d v1.Descriptor) (content.ReaderAt, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, err
	}
	f, err := os.Open(l.path(d.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("blob %s: %w", d.Digest, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if images.IsManifestType(d.MediaType) || images.IsIndexType(d.MediaType) {
		// It is read into memory before containerd has verified it.
		defer f.Close()
		if st.Size() > maxLayoutIndex {
			return nil, fmt.Errorf("blob %s has %d bytes, which is too much for a description of an image", d.Digest, st.Size())
		}
		data, err := io.ReadAll(io.LimitReader(f, maxLayoutIndex))
		if err == nil && digest.FromBytes(data) != d.Digest {
			err = fmt.Errorf("blob %s is damaged", d.Digest)
		}
		return smallBlob{bytes.NewReader(data)}, err
	}
	return largeBlob{f, st.Size()}, nil
}

type largeBlob struct {
	*os.File
	size int64
}

func (b largeBlob) Size() int64 { return b.size }

type smallBlob struct{ *bytes.Reader }

func (smallBlob) Close() error { return nil }
