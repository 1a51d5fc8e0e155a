package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kedge/appliance/release"
	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
)

// Extract writes the contents of a bundle into a new folder: the executables, images as an OCI layout, manifests, charts
// and settings. After an error it removes the folder.
func (b *File) Extract(ctx context.Context, dir string, show Progress) (err error) {
	if b.Index.Base != "" {
		return errorkind.Permanent(fmt.Errorf("the bundle %s has only what is new, and cannot be extracted; extract the whole bundle", b.Path))
	}
	if err := os.Mkdir(dir, 0o755); errors.Is(err, fs.ErrExist) {
		return errorkind.Permanent(fmt.Errorf("%s exists; name a folder that does not", dir))
	} else if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	done, total := int64(0), int64(0)
	for _, p := range b.Index.parts() {
		total += p.Size
	}
	write := func(p Part, mode fs.FileMode, name ...string) error {
		path := filepath.Join(append([]string{dir}, name...)...)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		return writeFile(path, mode, show.reader(ctx, b.reader(p, b.Index.nameOf(p)), &done, total))
	}
	for _, e := range b.Index.Executables {
		if err := write(e.Part, 0o755, release.Executable(e.Architecture)); err != nil {
			return err
		}
	}
	files := map[string]bool{}
	for folder, items := range map[string][]Item{"manifests": b.Index.Manifests, "charts": b.Index.Charts} {
		for _, it := range items {
			files[it.SHA256] = true
			if err := write(*b.Index.content(it.SHA256), 0o644, folder, it.Name); err != nil {
				return err
			}
		}
	}
	for _, p := range b.Index.Contents {
		if files[p.SHA256] {
			continue
		}
		if err := write(p, 0o644, "images", "blobs", "sha256", p.SHA256); err != nil {
			return err
		}
	}
	if len(b.Index.Images) > 0 {
		if err := writeLayout(filepath.Join(dir, "images"), b.Index.Images); err != nil {
			return err
		}
	}
	if b.Index.Config == "" {
		return nil
	}
	return os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(b.Index.Config), 0o644)
}

// writeFile writes a file durably. A failure leaves no file.
func writeFile(path string, mode fs.FileMode, r io.Reader) (err error) {
	tmp := filepath.Join(filepath.Dir(path), ".tmp-"+filepath.Base(path))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err == nil {
		err = f.Chmod(mode) // the umask may have cleared bits
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

// layoutIndex returns index.json of an OCI layout with images, under the names that containerd and kedge read.
func layoutIndex(all []Image) ([]byte, error) {
	index := v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex}
	for _, img := range all {
		d := img.Descriptor
		d.Annotations = map[string]string{nameAnnotation: img.Name}
		index.Manifests = append(index.Manifests, d)
	}
	return json.MarshalIndent(index, "", "  ")
}

// writeLayout writes the files that make a folder with blobs an OCI layout.
func writeLayout(dir string, all []Image) error {
	version, err := json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if _, err := atomicfile.WriteIfChanged(filepath.Join(dir, v1.ImageLayoutFile), version, 0o644); err != nil {
		return err
	}
	index, err := layoutIndex(all)
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(filepath.Join(dir, v1.ImageIndexFile), index, 0o644)
	return err
}
