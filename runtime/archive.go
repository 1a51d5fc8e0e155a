package runtime

import (
	"archive/tar"
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
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

// archiveError describes a fault of an archive which only the user can fix. Images stores text in the import
// record.
type archiveError struct {
	file string
	text string
}

func (e *archiveError) Error() string { return "image archive " + e.file + " " + e.text }

// isArchive reports whether a file name has the extension of an image archive.
func isArchive(name string) bool {
	if strings.HasPrefix(name, ".") {
		return false
	}
	// Archives with an unsupported compression count too: decompress then reports the compression, instead of
	// ignoring the file.
	for _, ending := range []string{".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4", ".tar.lzma", ".tar.Z"} {
		if strings.HasSuffix(name, ending) {
			return true
		}
	}
	return false
}

// unsupportedCompressions lists the compressions that kedge does not read, by the first bytes of the file.
var unsupportedCompressions = []struct {
	magic         string
	name, command string
}{
	{"\xfd7zXZ\x00", "xz", "xz -d"},
	{"\x04\x22\x4d\x18", "lz4", "lz4 -d"},
	{"\x5d\x00\x00", "lzma", "unlzma"},
	{"LZIP", "lzip", "lzip -d"},
	{"\x1f\x9d", "compress", "uncompress"},
	{"PK\x03\x04", "zip", "unzip"},
	{"7z\xbc\xaf", "7-Zip", "7z x"},
}

// decompress returns a reader of the decompressed content of b, or nil if b is not compressed. It detects the
// compression by content, because file names are unreliable.
func decompress(file string, b *bufio.Reader) (io.ReadCloser, error) {
	magic, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(b)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		d, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(b)), nil
	}
	for _, o := range unsupportedCompressions {
		if bytes.HasPrefix(magic, []byte(o.magic)) {
			return nil, &archiveError{file, fmt.Sprintf("is compressed with %s, which kedge does not read: unpack it with %q, or provide it as .tar, .tar.gz, .tar.bz2 or .tar.zst", o.name, o.command)}
		}
	}
	return nil, nil
}

// archiveBuffer is the size of the read buffer for archives, in bytes.
const archiveBuffer = 1 << 20

// importArchive stores the images of an archive, or of several archives concatenated by cat, under the names
// that Docker would use. It unpacks and pins the images, and returns their names. file is the name of the
// archive in messages.
//
// The import stops before the disk is full, and the garbage collector removes what it has stored: the size of
// an archive says little about the size of its unpacked layers.
func importArchive(ctx context.Context, client *containerd.Client, snapshotter layers, file string, r io.Reader) ([]string, error) {
	ctx, stop := watchSpace(ctx, snapshotter.dir)
	defer stop()
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	defer done(context.WithoutCancel(ctx))
	names, err := importJoined(ctx, client, snapshotter, file, bufio.NewReaderSize(r, archiveBuffer), false)
	var full *fullError
	if err != nil && errors.As(context.Cause(ctx), &full) {
		err = full.of(file) // the cause of the cancellation is the error to report
	}
	return names, err
}

// importJoined imports archives until b ends. An archive whose images cannot be used does not prevent the
// import of the archives after it. After a read error the import ends, because the start of the next archive is
// unknown.
func importJoined(ctx context.Context, client *containerd.Client, snapshotter layers, file string, b *bufio.Reader, compressed bool) (names []string, err error) {
	var problem *archiveError
	for more := true; more; {
		var plain io.ReadCloser
		if !compressed { // compression is never nested
			if plain, err = decompress(file, b); err != nil {
				return names, readError(file, err)
			}
		}
		var found []string
		if plain == nil {
			found, more, err = importOne(ctx, client, snapshotter, file, b)
		} else {
			// Concatenated files of one compression are a single stream for its decoder.
			found, err = importJoined(ctx, client, snapshotter, file, bufio.NewReaderSize(plain, archiveBuffer), true)
			plain.Close()
			more = false
		}
		names = append(names, found...)
		var about *archiveError
		switch {
		case err == nil:
		case more && errors.As(err, &about):
			problem = cmp.Or(problem, about)
		default:
			return names, err
		}
	}
	if problem != nil {
		return names, problem
	}
	return names, nil
}

// skipPadding reads the zeros after the end of an archive, and reports whether more data follows. Reading to
// the end also verifies the checksum of a compressed file.
func skipPadding(b *bufio.Reader) (more bool, err error) {
	for {
		c, err := b.ReadByte()
		switch {
		case errors.Is(err, io.EOF):
			return false, nil
		case err != nil:
			return false, err
		case c != 0:
			return true, b.UnreadByte()
		}
	}
}

// importOne imports the archive at the start of b, and reports whether more data follows it. Images get their
// names only after the whole archive was read, so that a truncated archive leaves only blobs, which the garbage
// collector removes.
func importOne(ctx context.Context, client *containerd.Client, snapshotter layers, file string, b *bufio.Reader) (names []string, more bool, err error) {
	store := client.ContentStore()
	index, err := archive.ImportIndex(ctx, store, b)
	if err != nil {
		return nil, false, readError(file, err)
	}
	if more, err = skipPadding(b); err != nil {
		return nil, false, readError(file, err)
	}
	data, err := content.ReadBlob(ctx, store, index)
	if err != nil {
		return nil, more, readError(file, err)
	}
	var list v1.Index
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, more, readError(file, err)
	}
	names, err = nameImages(ctx, client, snapshotter, file, list)
	return names, more, err
}

// nameImages creates the images of an index whose content is in the store, and returns their names.
func nameImages(ctx context.Context, client *containerd.Client, snapshotter layers, file string, list v1.Index) (names []string, err error) {
	store := client.ContentStore()
	var foreign []v1.Platform
	ours, unknown := 0, 0
	for _, m := range list.Manifests {
		if _, ok := m.Annotations[images.AnnotationManifestSubject]; ok || m.Annotations["vnd.docker.reference.type"] != "" {
			continue // a signature or attestation, not an image
		}
		has, present, err := checkPlatform(ctx, store, m)
		if err != nil {
			return names, readError(file, err)
		}
		if !has {
			unknown++
			foreign = append(foreign, present...)
			continue
		}
		ours++
		named, err := nameImage(ctx, client, snapshotter, file, m)
		names = append(names, named...)
		if err != nil {
			return names, fmt.Errorf("import image archive %s: %w", file, err)
		}
	}
	if unknown > 0 {
		return names, &archiveError{file, fmt.Sprintf("contains %s for %s, but this node runs %s; provide the archive for %s",
			imagesFor(unknown, ours), platformList(foreign), platforms.Format(platforms.DefaultSpec()), platforms.DefaultSpec().Architecture)}
	}
	if ours == 0 {
		return nil, &archiveError{file, "contains no image"}
	}
	return names, nil
}

// checkPlatform reports whether the archive has all parts of an image for this machine's platform, and otherwise the
// platforms that it has. A multi-platform image is often saved with the content of one platform only.
func checkPlatform(ctx context.Context, store content.Store, desc v1.Descriptor) (bool, []v1.Platform, error) {
	matcher := platforms.Default()
	if m, err := images.Manifest(ctx, store, desc, matcher); err == nil {
		for _, part := range append([]v1.Descriptor{m.Config}, m.Layers...) {
			if _, err := store.Info(ctx, part.Digest); err != nil {
				return false, nil, fmt.Errorf("blob %s is missing from the archive: %w", part.Digest, err)
			}
		}
		// An image without an architecture matches any platform.
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
	return false, storedPlatforms(ctx, store, desc), nil
}

// storedPlatforms returns the platforms of an image, of all those listed in its index, whose content is in the
// store.
func storedPlatforms(ctx context.Context, store content.Store, desc v1.Descriptor) []v1.Platform {
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

// nameImage creates the image's names, by tag and by digest, and unpacks the image.
func nameImage(ctx context.Context, client *containerd.Client, snapshotter layers, file string, desc v1.Descriptor) ([]string, error) {
	store := client.ContentStore()
	// The garbage collector follows these labels from a blob to the blobs that it refers to.
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
	if err := unpacked.Unpack(ctx, snapshotter.name); err != nil {
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

// imageName returns the full name that Docker would use for an image: an archive may say "busybox". An OCI
// layout may have a tag without a repository; the repository is then derived from the file name.
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

// readError translates the errors of a damaged or truncated archive into an archiveError.
func readError(file string, err error) error {
	text := ""
	var known *archiveError
	var bz bzip2.StructuralError
	switch {
	case errors.As(err, &known):
		return err
	case errors.As(err, &bz):
		text = "is damaged or not an image archive; copy it again"
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF), errors.Is(err, zstd.ErrMagicMismatch):
		text = "ends too early; copy it again, and rename it into the folder when it is complete"
	case errors.Is(err, tar.ErrHeader), errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.Is(err, zstd.ErrCRCMismatch):
		text = "is damaged or not an image archive; copy it again"
	case strings.Contains(err.Error(), "unrecognized image format"):
		text = "is not an image archive: it contains neither manifest.json nor an OCI layout"
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
