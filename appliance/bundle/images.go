package bundle

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
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kedge/internal/atomicfile"
)

// Sources has the functions by which images are read from elsewhere. They put the blobs of images into a folder, as the
// blobs of an OCI layout.
type Sources struct {
	// Archive reads an archive. name is for messages, and for images without a name.
	Archive func(ctx context.Context, name string, r io.Reader, dir string) ([]Image, error)
	// Export writes an image of the running node to an archive.
	Export func(ctx context.Context, to io.Writer, image string) error
	// Pull pulls an image for some architectures.
	Pull func(ctx context.Context, image string, architectures []string, dir string) (Image, error)
}

// read returns the images of one source, and the folder with their blobs: the source itself, or dir.
func (s Sources) read(ctx context.Context, from Source, architectures []string, dir string) ([]Image, layout, error) {
	switch {
	case from.Archive != "":
		f, err := os.Open(from.Archive)
		if err != nil {
			return nil, "", err
		}
		defer f.Close()
		var read int64
		found, err := s.Archive(ctx, filepath.Base(from.Archive), Progress(nil).reader(ctx, f, &read, 0), dir)
		return found, layout(dir), err
	case from.Layout != "":
		found, err := readLayout(from.Layout)
		return found, layout(from.Layout), err
	case from.Node != "":
		found, err := s.export(ctx, from.Node, dir)
		return found, layout(dir), err
	}
	img, err := s.Pull(ctx, from.Pull, architectures, dir)
	return []Image{img}, layout(dir), err
}

// export reads an image of the running node.
func (s Sources) export(ctx context.Context, image, dir string) ([]Image, error) {
	r, w := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := s.Export(ctx, w, image)
		w.CloseWithError(err)
		ended <- err
	}()
	found, err := s.Archive(ctx, image, r, dir)
	r.Close() // ends the export
	// Its error is the cause of that of the reader.
	if cause := <-ended; cause != nil && !errors.Is(cause, io.ErrClosedPipe) {
		return nil, cause
	}
	return found, err
}

// blobs opens the parts of images. It returns an error that is [fs.ErrNotExist] for a part that is missing.
type blobs interface {
	open(d v1.Descriptor) (r io.ReadCloser, size int64, err error)
}

// layout is a folder with an OCI layout. It is only read.
type layout string

func (l layout) open(d v1.Descriptor) (io.ReadCloser, int64, error) {
	f, err := os.Open(filepath.Join(string(l), "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded()))
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size(), nil
}

// nameAnnotation has the full name of an image in index.json, for containerd and kedge.
const nameAnnotation = "io.containerd.image.name"

// maxList bounds the size of index.json of a layout.
const maxList = 4 << 20

// readLayout returns the images of an OCI layout.
func readLayout(dir string) ([]Image, error) {
	data, err := atomicfile.ReadSmall(filepath.Join(dir, v1.ImageLayoutFile), maxList)
	var version v1.ImageLayout
	if err != nil || json.Unmarshal(data, &version) != nil || version.Version != v1.ImageLayoutVersion {
		return nil, fmt.Errorf("the folder %s is not an OCI layout: it has no file %s of version %s", dir, v1.ImageLayoutFile, v1.ImageLayoutVersion)
	}
	if data, err = atomicfile.ReadSmall(filepath.Join(dir, v1.ImageIndexFile), maxList); err != nil {
		return nil, err
	}
	var index v1.Index
	if err := json.Unmarshal(data, &index); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, v1.ImageIndexFile), err)
	}
	var found []Image
	for _, d := range index.Manifests {
		text := d.Annotations[nameAnnotation]
		if text == "" {
			text = d.Annotations[v1.AnnotationRefName]
		}
		if !strings.ContainsAny(text, "/:@") {
			return nil, fmt.Errorf("the folder %s has an image with the name %q, which is not the full name of an image; give it one in the annotation %s of index.json", dir, text, nameAnnotation)
		}
		name, err := imageName(text)
		if err != nil {
			return nil, err
		}
		found = append(found, Image{Name: name, Descriptor: d})
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("the folder %s has no image", dir)
	}
	return found, nil
}

// maxDocument bounds the size of a description of an image, which is read into memory, in bytes.
const maxDocument = 8 << 20

// maxNesting bounds the depth of indexes in indexes.
const maxNesting = 4

// blobsOf returns all blobs of an image for some architectures, parents first. It returns an error if the image is not for
// all of them, or if a blob is missing.
func blobsOf(ctx context.Context, from blobs, img Image, architectures []string) ([]v1.Descriptor, error) {
	w := walk{from: from, img: img, seen: map[digest.Digest]bool{}}
	for _, a := range architectures {
		w.wanted = append(w.wanted, platforms.Normalize(v1.Platform{OS: "linux", Architecture: a}))
	}
	if err := w.visit(ctx, img.Descriptor, 0); err != nil {
		return nil, err
	}
	for i, want := range w.wanted {
		if !slices.ContainsFunc(w.found, func(p v1.Platform) bool { return p.Architecture == "" || platforms.NewMatcher(want).Match(p) }) {
			return nil, fmt.Errorf("the image %s is not for %s; use the image for this architecture, or one for several", img.Name, architectures[i])
		}
	}
	return w.all, nil
}

// walk visits the parts of an image.
type walk struct {
	from   blobs
	img    Image
	wanted []v1.Platform

	all   []v1.Descriptor
	seen  map[digest.Digest]bool
	found []v1.Platform // of the manifests; without an architecture for an image that does not say it
}

func (w *walk) visit(ctx context.Context, d v1.Descriptor, depth int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	switch d.MediaType {
	case v1.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json":
		var index v1.Index
		if depth > maxNesting {
			return fmt.Errorf("the image %s has lists of images that are nested too deeply", w.img.Name)
		}
		if err := w.document(d, &index); err != nil {
			return err
		}
		for _, m := range index.Manifests {
			if m.Platform != nil && !platforms.Any(w.wanted...).Match(*m.Platform) {
				continue
			}
			if err := w.visit(ctx, m, depth+1); err != nil {
				return err
			}
		}
		return nil
	case v1.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json":
		return w.manifest(d)
	}
	return fmt.Errorf("the image %s has a part of the unknown kind %q", w.img.Name, d.MediaType)
}

func (w *walk) manifest(d v1.Descriptor) error {
	var m v1.Manifest
	if err := w.document(d, &m); err != nil {
		return err
	}
	var config v1.Image
	if err := w.document(m.Config, &config); err != nil {
		return err
	}
	if d.Platform != nil {
		config.Platform = *d.Platform
	}
	w.found = append(w.found, config.Platform)
	for _, l := range m.Layers {
		r, err := w.open(l)
		if err != nil {
			return err
		}
		if err := r.Close(); err != nil {
			return err
		}
	}
	return nil
}

// open opens a part and adds it to the parts of the image.
func (w *walk) open(d v1.Descriptor) (io.ReadCloser, error) {
	if d.Digest.Validate() != nil || d.Digest.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("the image %s has a part with the digest %q; only SHA-256 is possible", w.img.Name, d.Digest)
	}
	r, size, err := w.from.open(d)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the part %s of the image %s is missing; save the image again with all parts", d.Digest, w.img.Name)
	}
	if err != nil {
		return nil, err
	}
	if size != d.Size {
		r.Close()
		return nil, fmt.Errorf("the part %s of the image %s has %d bytes and not %d; copy the image again", d.Digest, w.img.Name, size, d.Size)
	}
	if !w.seen[d.Digest] {
		w.seen[d.Digest], w.all = true, append(w.all, d)
	}
	return r, nil
}

// document reads a part that describes others.
func (w *walk) document(d v1.Descriptor, to any) error {
	r, err := w.open(d)
	if err != nil {
		return err
	}
	defer r.Close()
	if d.Size > maxDocument {
		return fmt.Errorf("a description of the image %s has %d MiB, which is too much", w.img.Name, d.Size>>20)
	}
	data, err := io.ReadAll(io.LimitReader(r, d.Size+1)) // to the end, where a reader may find that the content is damaged
	if err != nil {
		return err
	}
	if digest.FromBytes(data) != d.Digest {
		return fmt.Errorf("the part %s of the image %s is damaged; copy the image again", d.Digest, w.img.Name)
	}
	if err := json.NewDecoder(bytes.NewReader(data)).Decode(to); err != nil {
		return fmt.Errorf("a description of the image %s cannot be read: %w", w.img.Name, err)
	}
	return nil
}
