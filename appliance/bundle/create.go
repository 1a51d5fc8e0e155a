package bundle

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"aead.dev/minisign"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kedge/internal/errorkind"
)

// Order is what [Create] makes a bundle of.
type Order struct {
	Spec    Spec
	MadeBy  string // the version of kedge
	Output  string
	Sources Sources
	Key     *minisign.PrivateKey // nil for a bundle that is not signed
	Say     func(text string)    // is told what is done
}

// Create writes a bundle. A failure leaves no file.
func Create(ctx context.Context, o Order) (_ *Index, err error) {
	programs, err := openPrograms(o.Spec.Executables)
	defer programs.close()
	if err != nil {
		return nil, err
	}
	w, err := newWriter(o.Output)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			w.abort()
		}
	}()
	w.index.MadeBy = o.MadeBy
	if w.index.Config, err = o.Spec.Settings(); err != nil {
		return nil, err
	}
	if err := w.executables(ctx, programs.list(), programs.open); err != nil {
		return nil, err
	}
	needed, err := w.files(ctx, o.Spec)
	if err != nil {
		return nil, err
	}
	if err := w.images(ctx, o, programs.architectures()); err != nil {
		return nil, err
	}
	for _, name := range needed {
		if !slices.ContainsFunc(w.index.Images, func(img Image) bool { return img.Name == name }) {
			o.Say(fmt.Sprintf("warning: the manifests need the image %s, which the bundle does not have", name))
		}
	}
	return &w.index, w.finish(o.Key)
}

// files writes manifests and charts, and returns the images that the manifests need.
func (w *writer) files(ctx context.Context, s Spec) (needed []string, err error) {
	files, err := manifestFiles(s.Manifests)
	if err != nil {
		return nil, err
	}
	for i, f := range files {
		data, images, err := readManifest(f)
		if err != nil {
			return nil, err
		}
		// The number keeps the order, and files of different folders apart.
		item, err := w.file(ctx, fmt.Sprintf("%03d-%s", i+1, plainName(filepath.Base(f))), data)
		if err != nil {
			return nil, err
		}
		w.index.Manifests = append(w.index.Manifests, item)
		needed = append(needed, images...)
	}
	for _, f := range s.Charts {
		data, err := readChart(f)
		if err != nil {
			return nil, err
		}
		item, err := w.file(ctx, plainName(filepath.Base(f)), data)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(w.index.Charts, func(c Item) bool { return c.Name == item.Name }) {
			return nil, errorkind.Permanent(fmt.Errorf("two charts have the name %s; rename one of the files", item.Name))
		}
		w.index.Charts = append(w.index.Charts, item)
	}
	slices.Sort(needed)
	return slices.Compact(needed), nil
}

// plainName replaces what the name of a file in a bundle cannot have.
func plainName(name string) string {
	name = strings.Map(func(c rune) rune {
		if validName("a" + string(c)) {
			return c
		}
		return '_'
	}, name)
	if len(name) > 150 {
		name = name[len(name)-150:]
	}
	return strings.TrimLeft(name, ".-")
}

func (w *writer) file(ctx context.Context, name string, data []byte) (Item, error) {
	sum := sha256.Sum256(data)
	item := Item{Name: name, SHA256: hex.EncodeToString(sum[:])}
	return item, w.content(ctx, item.SHA256, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil })
}

// images writes the images of all sources. Blobs that do not come from a folder are kept beside the output meanwhile.
func (w *writer) images(ctx context.Context, o Order, architectures []string) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(o.Output), "."+filepath.Base(o.Output)+"-images-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for i, from := range o.Spec.Images {
		// Each source has a folder of its own, so that a damaged source fails with its own name.
		at := filepath.Join(dir, fmt.Sprint(i))
		found, parts, err := o.Sources.read(ctx, from, architectures, at)
		if err != nil {
			return err
		}
		for _, img := range found {
			if err := w.image(ctx, parts, img, architectures); err != nil {
				return err
			}
			o.Say("added image " + img.Name)
		}
		if err := os.RemoveAll(at); err != nil {
			return err
		}
	}
	return nil
}

func (w *writer) image(ctx context.Context, from blobs, img Image, architectures []string) error {
	for _, have := range w.index.Images {
		if have.Name == img.Name && have.Descriptor.Digest == img.Descriptor.Digest {
			return nil
		}
		if have.Name == img.Name {
			return errorkind.Permanent(fmt.Errorf("two images have the name %s, and differ; leave one out", img.Name))
		}
	}
	parts, err := blobsOf(ctx, from, img, architectures)
	if err != nil {
		return err
	}
	for _, d := range parts {
		if err := w.content(ctx, d.Digest.Encoded(), func() (io.ReadCloser, error) {
			r, _, err := from.open(d)
			return r, err
		}); err != nil {
			return err
		}
	}
	// Annotations belong to the place that the image comes from.
	d := img.Descriptor
	w.index.Images = append(w.index.Images, Image{img.Name, v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Platform: d.Platform}})
	return nil
}

// programs are the executables that go into a bundle.
type programs []openProgram

type openProgram struct {
	f            *os.File
	architecture string
	offset, size int64
}

// openPrograms opens executables. Those of a file that is a bundle itself are taken out of it.
func openPrograms(paths []string) (all programs, err error) {
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return all, err
		}
		all = append(all, openProgram{f: f})
		p := &all[len(all)-1]
		st, err := f.Stat()
		if err != nil {
			return all, err
		}
		found, err := readELF(f, st.Size())
		if err != nil {
			return all, errorkind.Permanent(fmt.Errorf("%s is not the executable of kedge: %w", path, err))
		}
		p.architecture, p.size = found.architecture, found.size
		info, err := buildinfo.Read(io.NewSectionReader(f, 0, found.size))
		if err != nil || info.Path != "kedge/launcher" && info.Path != "kedge" {
			return all, errorkind.Permanent(fmt.Errorf("%s is an executable, and not that of kedge", path))
		}
		for _, other := range all[:len(all)-1] {
			if other.architecture == p.architecture {
				return all, errorkind.Permanent(fmt.Errorf("two executables are for %s; leave one out", p.architecture))
			}
		}
	}
	return all, nil
}

func (p programs) close() {
	for _, e := range p {
		e.f.Close()
	}
}

func (p programs) list() (all []Executable) {
	for _, e := range p {
		all = append(all, Executable{e.architecture, Part{Size: e.size}})
	}
	return all
}

func (p programs) architectures() (all []string) {
	for _, e := range p {
		all = append(all, e.architecture)
	}
	return all
}

func (p programs) open(e Executable) io.Reader {
	for _, have := range p {
		if have.architecture == e.Architecture {
			return io.NewSectionReader(have.f, have.offset, have.size)
		}
	}
	return strings.NewReader("")
}

// ProgramSum returns the size and the SHA-256 of the executable at the begin of a file.
func ProgramSum(path string) (size int64, sum string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, "", err
	}
	p, err := readELF(f, st.Size())
	if err != nil {
		return 0, "", fmt.Errorf("%s is not an executable: %w", path, err)
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, 0, p.size)); err != nil {
		return 0, "", err
	}
	return p.size, hex.EncodeToString(h.Sum(nil)), nil
}
