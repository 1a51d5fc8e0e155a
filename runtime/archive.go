package runtime

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	distribution "github.com/distribution/reference"
	"github.com/klauspost/compress/zstd"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// archiveError is a sentence about an archive that only its owner can mend.
type archiveError struct {
	file string
	text string
}

func (e *archiveError) Error() string { return "image archive " + e.file + " " + e.text }

// isArchive reports whether a file's name is one that is imported.
func isArchive(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	for _, ending := range []string{".tar", ".tar.gz", ".tgz", ".tar.zst"} {
		if strings.HasSuffix(name, ending) {
			return true
		}
	}
	return false
}

// decompress looks at the content, not at the name: people rename files.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(b)
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(b), nil
}

// importArchive stores the images of one archive, under the names that Docker would
// use, unpacked and pinned, and returns the names. file is what messages call it.
// Nothing is named until all of the archive was read, so that one which ends
// halfway leaves only blobs, which are collected.
func importArchive(ctx context.Context, client *containerd.Client, snapshotter, file string, r io.Reader) ([]string, error) {
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	defer done(ctx)

	plain, err := decompress(r)
	if err != nil {
		return nil, readError(file, err)
	}
	defer plain.Close()
	store := client.ContentStore()
	index, err := archive.ImportIndex(ctx, store, plain)
	if err != nil {
		return nil, readError(file, err)
	}
	// What follows the end of the archive belongs to the compression, and its
	// checksum is worth having.
	if _, err := io.Copy(io.Discard, plain); err != nil {
		return nil, readError(file, err)
	}
	data, err := content.ReadBlob(ctx, store, index)
	if err != nil {
		return nil, readError(file, err)
	}
	var list v1.Index
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, readError(file, err)
	}

	var names []string
	var foreign []v1.Platform
	ours, strangers := 0, 0
	for _, m := range list.Manifests {
		if _, ok := m.Annotations[images.AnnotationManifestSubject]; ok || m.Annotations["vnd.docker.reference.type"] != "" {
			continue // a signature or the like, about an image
		}
		has, others, err := runsHere(ctx, store, m)
		if err != nil {
			return names, readError(file, err)
		}
		if !has {
			strangers++
			foreign = append(foreign, others...)
			continue
		}
		ours++
		named, err := nameImage(ctx, client, snapshotter, file, m)
		names = append(names, named...)
		if err != nil {
			return names, fmt.Errorf("import image archive %s: %w", file, err)
		}
	}
	if strangers > 0 {
		return names, &archiveError{file, fmt.Sprintf("holds %s for %s, but this node runs %s; bring the archive for %s",
			imagesFor(strangers, ours), platformList(foreign), platforms.Format(platforms.DefaultSpec()), platforms.DefaultSpec().Architecture)}
	}
	if ours == 0 {
		return nil, &archiveError{file, "holds no image"}
	}
	return names, nil
}

// runsHere reports whether the archive has all that this machine needs of an image,
// and, if not, what it is for. An image for many architectures is often saved with
// the content of one.
func runsHere(ctx context.Context, store content.Store, desc v1.Descriptor) (bool, []v1.Platform, error) {
	matcher := platforms.Default()
	if m, err := images.Manifest(ctx, store, desc, matcher); err == nil {
		for _, part := range append([]v1.Descriptor{m.Config}, m.Layers...) {
			if _, err := store.Info(ctx, part.Digest); err != nil {
				return false, nil, fmt.Errorf("part %s is missing: %w", part.Digest, err)
			}
		}
		// An image that names no architecture passes for any.
		found, err := images.Platforms(ctx, store, desc)
		if err != nil && !errdefs.IsNotFound(err) {
			return false, nil, err
		}
		if len(found) == 0 || slices.ContainsFunc(found, matcher.Match) {
			return true, nil, nil
		}
		return false, found, nil
	} else if !errdefs.IsNotFound(err) {
		return false, nil, err
	}
	return false, presentPlatforms(ctx, store, desc), nil
}

// presentPlatforms is what the content of an image is for, of all that it lists.
func presentPlatforms(ctx context.Context, store content.Store, desc v1.Descriptor) []v1.Platform {
	var found []v1.Platform
	listed, err := images.Children(ctx, store, desc)
	for _, m := range listed {
		if _, missing := store.Info(ctx, m.Digest); err == nil && missing == nil && m.Platform != nil {
			found = append(found, *m.Platform)
		}
	}
	if len(found) == 0 && desc.Platform != nil {
		found = append(found, *desc.Platform)
	}
	return found
}

// nameImage gives an image its names, by tag and by digest, and unpacks it.
func nameImage(ctx context.Context, client *containerd.Client, snapshotter, file string, desc v1.Descriptor) ([]string, error) {
	store := client.ContentStore()
	// Labels on blobs keep the collector off: from each to what it refers to.
	var children images.HandlerFunc = func(ctx context.Context, d v1.Descriptor) ([]v1.Descriptor, error) {
		below, err := images.Children(ctx, store, d)
		if errdefs.IsNotFound(err) {
			return nil, images.ErrSkipDesc
		}
		return below, err
	}
	handler := images.SetChildrenLabels(store, images.FilterPlatforms(children, platforms.Default()))
	if err := images.Walk(ctx, handler, desc); err != nil {
		return nil, err
	}
	name, err := imageName(file, desc)
	if err != nil {
		return nil, err
	}
	names := []string{name.String()}
	if digested, err := distribution.WithDigest(distribution.TrimNamed(name), desc.Digest); err == nil {
		names = append(names, digested.String())
	}
	img := images.Image{Target: desc, Labels: importedLabels()}
	unpacked := containerd.NewImageWithPlatform(client, img, platforms.Default())
	if err := unpacked.Unpack(ctx, snapshotter); err != nil {
		return nil, fmt.Errorf("unpack %s: %w", name, err)
	}
	for _, n := range names {
		img.Name = n
		if err := putImage(ctx, client, img); err != nil {
			return nil, fmt.Errorf("name %s: %w", n, err)
		}
	}
	return names, nil
}

// imageName is the full name that Docker would give: an archive may say "busybox".
// An OCI layout may hold a tag and no repository; the file's name serves then.
func imageName(file string, desc v1.Descriptor) (distribution.Named, error) {
	text := desc.Annotations[images.AnnotationImageName]
	if text == "" {
		text = desc.Annotations[v1.AnnotationRefName]
	}
	if !strings.ContainsAny(text, "/:@") {
		tag := text
		if tag == "" {
			tag = desc.Digest.Encoded()[:12]
		}
		base, _, _ := strings.Cut(filepath.Base(file), ".tar")
		text = "kedge.local/imported/" + strings.ToLower(strings.TrimSuffix(base, ".tgz")) + ":" + tag
	}
	name, err := distribution.ParseDockerRef(text)
	if err != nil {
		return nil, fmt.Errorf("image name %q: %w", text, err)
	}
	return name, nil
}

// readError turns the ways in which a file that is not whole shows into one sentence.
func readError(file string, err error) error {
	text := ""
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, zstd.ErrMagicMismatch):
		text = "ends too early; copy it again, and rename it into the folder when it is complete"
	case errors.Is(err, tar.ErrHeader), errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.Is(err, zstd.ErrCRCMismatch):
		text = "is damaged or not an image archive; copy it again"
	case strings.Contains(err.Error(), "unrecognized image format"):
		text = "is no image archive: it holds neither manifest.json nor an OCI layout"
	default:
		return fmt.Errorf("import image archive %s: %w", file, err)
	}
	return &archiveError{file, text}
}

func imagesFor(foreign, ours int) string {
	some := fmt.Sprintf("%d image", foreign)
	if foreign > 1 {
		some += "s"
	}
	if ours > 0 {
		some += fmt.Sprintf(" (of %d)", foreign+ours)
	}
	return some
}

func platformList(list []v1.Platform) string {
	if len(list) == 0 {
		return "an unknown architecture"
	}
	set := map[string]bool{}
	for _, p := range list {
		set[platforms.Format(platforms.Normalize(p))] = true
	}
	return strings.Join(sortedKeys(set), ", ")
}
