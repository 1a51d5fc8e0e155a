// Package image builds small image archives from files, for tests that need an
// image and may not pull one. It writes the two forms that the images folder
// accepts: what "docker save" writes, and an OCI layout in a tar file.
//
// Only tests and scripts may import it.
package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Busybox is the path of the program of the Debian package busybox-static.
const Busybox = "/bin/busybox"

// Format is the layout of an archive.
type Format int

// The layouts that Image can be written in.
const (
	Docker Format = iota // manifest.json, as docker save writes
	OCI                  // index.json and blobs
)

// Image describes an image. The zero value with a Name is an empty image.
type Image struct {
	// Name is the full reference, as users write it: "busybox:test".
	Name string
	// Architecture defaults to this machine's.
	Architecture string
	// Missing has further architectures in the image's index whose content is not in the
	// archive, as when a machine saves an image for several architectures. Only for OCI.
	Missing []string
	// Files are the contents of the only layer, by absolute path.
	Files      map[string]File
	Env        []string
	Entrypoint []string
	Cmd        []string
	User       string
}

// File is an entry of the layer: content and mode, the target of a link, or a directory if Mode
// says so. Parent directories of files need no entry.
type File struct {
	Data []byte
	Mode os.FileMode // default 0644; may have ModeDir, ModeSetuid, ModeSetgid and ModeSticky
	Link string
}

// bits returns the mode in the form of archives.
func (f File) bits() int64 {
	mode := int64(f.Mode.Perm())
	if mode == 0 {
		mode = 0o644
	}
	for flag, bit := range map[os.FileMode]int64{os.ModeSetuid: 0o4000, os.ModeSetgid: 0o2000, os.ModeSticky: 0o1000} {
		if f.Mode&flag != 0 {
			mode |= bit
		}
	}
	return mode
}

// BusyboxImage is [NewBusybox] for a test, which it skips if the program is missing.
func BusyboxImage(t testing.TB, name string) Image {
	t.Helper()
	img, err := NewBusybox(name)
	if err != nil {
		t.Skip(err)
	}
	return img
}

// NewBusybox makes an image with a shell and the usual tools, from /bin/busybox of
// this machine.
func NewBusybox(name string) (Image, error) {
	program, err := os.ReadFile(Busybox)
	if err != nil {
		return Image{}, fmt.Errorf("needs %s (Debian package busybox-static): %w", Busybox, err)
	}
	files := map[string]File{
		"/bin/busybox": {Data: program, Mode: 0o755},
		"/etc/passwd":  {Data: []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		"/etc/group":   {Data: []byte("root:x:0:\nnogroup:x:65534:\n")},
	}
	for tool := range strings.FieldsSeq("sh cat ls sleep echo env id ps kill wget nc nslookup ip ping hostname mount touch rm mkdir true false test date head grep httpd tail stat df dd seq vi sed awk tr tar chmod stty readlink") {
		files["/bin/"+tool] = File{Link: "busybox"}
	}
	return Image{Name: name, Files: files, Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}}, nil
}

// Write is [WriteFile] for a test, which it fails after an error.
func Write(t testing.TB, name string, format Format, images ...Image) {
	t.Helper()
	if err := WriteFile(name, format, images...); err != nil {
		t.Fatal(err)
	}
}

// WriteFile writes one archive with all images to name. The ending of name decides
// the compression: .tar, .tar.gz, .tgz or .tar.zst.
func WriteFile(name string, format Format, images ...Image) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close() // harmless after a successful Close
	var w io.WriteCloser = f
	switch {
	case strings.HasSuffix(name, ".gz"), strings.HasSuffix(name, ".tgz"):
		w = gzip.NewWriter(f)
	case strings.HasSuffix(name, ".zst"):
		if w, err = zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedFastest)); err != nil {
			return err
		}
	}
	if err := Archive(w, format, images...); err != nil {
		return err
	}
	if w != f {
		if err := w.Close(); err != nil {
			return err
		}
	}
	return f.Close()
}

// Archive writes an uncompressed archive of images. Equal images give equal bytes.
func Archive(w io.Writer, format Format, images ...Image) error {
	a := &archive{tw: tar.NewWriter(w), written: map[string]bool{}}
	var err error
	switch format {
	case Docker:
		err = a.docker(images)
	case OCI:
		err = a.oci(images)
	default:
		err = fmt.Errorf("unknown format %d", format)
	}
	if err != nil {
		return err
	}
	return a.tw.Close()
}

type archive struct {
	tw      *tar.Writer
	written map[string]bool
}

type object = map[string]any

func (a *archive) docker(images []Image) error {
	var manifest []object
	for _, img := range images {
		layer, config, err := img.content()
		if err != nil {
			return err
		}
		layerName, configName := hash(layer)+"/layer.tar", hash(config)+".json"
		if err := a.file(layerName, layer); err != nil {
			return err
		}
		if err := a.file(configName, config); err != nil {
			return err
		}
		manifest = append(manifest, object{"Config": configName, "RepoTags": []string{img.Name}, "Layers": []string{layerName}})
	}
	return a.json("manifest.json", manifest)
}

func (a *archive) oci(images []Image) error {
	var manifests []object
	for _, img := range images {
		layer, config, err := img.content()
		if err != nil {
			return err
		}
		layerDesc, err := a.blob("application/vnd.oci.image.layer.v1.tar", layer)
		if err != nil {
			return err
		}
		configDesc, err := a.blob("application/vnd.oci.image.config.v1+json", config)
		if err != nil {
			return err
		}
		manifest, err := json.Marshal(object{
			"schemaVersion": 2,
			"mediaType":     "application/vnd.oci.image.manifest.v1+json",
			"config":        configDesc,
			"layers":        []object{layerDesc},
		})
		if err != nil {
			return err
		}
		desc, err := a.blob("application/vnd.oci.image.manifest.v1+json", manifest)
		if err != nil {
			return err
		}
		desc["platform"] = object{"os": "linux", "architecture": img.architecture()}
		if len(img.Missing) > 0 {
			if desc, err = a.index(desc, img.Missing); err != nil {
				return err
			}
		}
		desc["annotations"] = object{"org.opencontainers.image.ref.name": img.Name}
		manifests = append(manifests, desc)
	}
	if err := a.json("oci-layout", object{"imageLayoutVersion": "1.0.0"}); err != nil {
		return err
	}
	return a.json("index.json", object{"schemaVersion": 2, "manifests": manifests})
}

// index writes the index of an image for several architectures, of which the archive has one.
func (a *archive) index(there object, missing []string) (object, error) {
	list := []object{}
	for _, arch := range missing {
		list = append(list, object{
			"mediaType": there["mediaType"],
			"digest":    "sha256:" + hash([]byte(arch)),
			"size":      1,
			"platform":  object{"os": "linux", "architecture": arch},
		})
	}
	const mediaType = "application/vnd.oci.image.index.v1+json"
	data, err := json.Marshal(object{"schemaVersion": 2, "mediaType": mediaType, "manifests": append(list, there)})
	if err != nil {
		return nil, err
	}
	return a.blob(mediaType, data)
}

func (a *archive) blob(mediaType string, data []byte) (object, error) {
	sum := hash(data)
	err := a.file("blobs/sha256/"+sum, data)
	return object{"mediaType": mediaType, "digest": "sha256:" + sum, "size": len(data)}, err
}

func (a *archive) json(name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return a.file(name, data)
}

func (a *archive) file(name string, data []byte) error {
	if a.written[name] {
		return nil
	}
	a.written[name] = true
	if err := a.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := a.tw.Write(data)
	return err
}

func (i Image) architecture() string {
	if i.Architecture != "" {
		return i.Architecture
	}
	return goruntime.GOARCH
}

// content returns the layer and the configuration that names it.
func (i Image) content() (layer, config []byte, err error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	names := make([]string, 0, len(i.Files))
	dirs := map[string]bool{}
	for name, f := range i.Files {
		if f.Mode.IsDir() {
			dirs[name] = true
		} else {
			names = append(names, name)
		}
		for d := path.Dir(name); d != "/" && d != "."; d = path.Dir(d) {
			dirs[d] = true
		}
	}
	dirs["/tmp"] = true
	for _, d := range sorted(dirs) {
		mode := int64(0o755)
		if f, ok := i.Files[d]; ok {
			mode = f.bits()
		} else if d == "/tmp" {
			mode = 0o1777
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimPrefix(d, "/") + "/", Mode: mode, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, nil, err
		}
	}
	slices.Sort(names)
	for _, name := range names {
		f := i.Files[name]
		h := &tar.Header{Typeflag: tar.TypeReg, Name: strings.TrimPrefix(name, "/"), Mode: f.bits(), Size: int64(len(f.Data)), ModTime: time.Unix(0, 0)}
		if f.Link != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, f.Link, 0
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, nil, err
		}
		if f.Link == "" {
			if _, err := tw.Write(f.Data); err != nil {
				return nil, nil, err
			}
		}
	}
	if err := tw.Close(); err != nil {
		return nil, nil, err
	}
	layer = buf.Bytes()
	config, err = json.Marshal(object{
		"architecture": i.architecture(),
		"os":           "linux",
		"config":       object{"Env": i.Env, "Entrypoint": i.Entrypoint, "Cmd": i.Cmd, "User": i.User},
		"rootfs":       object{"type": "layers", "diff_ids": []string{"sha256:" + hash(layer)}},
	})
	return layer, config, err
}

func sorted(set map[string]bool) []string {
	out := make([]string, 0, len(set))
	for k := range set {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}
