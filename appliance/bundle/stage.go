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

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
)

// The contents of the installed bundle in a data directory:
//
//	images/bundle/                an OCI layout, which the node imports at its start
//	bundle/ID/installed.json      what is in the folder
//	bundle/ID/manifests, charts   files
//	bundle/current                a link to the folder of the installed bundle

// LayoutName is the name of the layout in the images folder.
const LayoutName = "bundle"

const (
	folderName    = "bundle" // in the data directory
	currentName   = "current"
	installedName = "installed.json"
)

// installed describes a folder of an installed bundle.
type installed struct {
	ID        string `json:"id"`
	Manifests []Item `json:"manifests,omitempty"`
	Charts    []Item `json:"charts,omitempty"`
}

// Staged are the contents of a bundle in a data directory, where they have no effect yet.
type Staged struct {
	file    *File
	dataDir string
	short   string          // the name of the folder in the data directory
	blobs   map[string]bool // the parts of images that this machine needs
	made    []string        // files and folders that Stage has made, in their order
}

// stagingSpare is what must stay free beside the contents, in bytes.
const stagingSpare = 64 << 20

// Stage copies the contents that a data directory lacks into it, for an architecture, and verifies them. After an error the
// directory is as before.
func (b *File) Stage(ctx context.Context, dataDir, architecture string, show Progress) (_ *Staged, err error) {
	s := b.staged(dataDir)
	defer func() {
		if err != nil {
			err = errors.Join(s.explain(err), s.Abort())
		}
	}()
	missing, err := s.missing(ctx, architecture)
	if err != nil {
		return nil, err
	}
	total := int64(0)
	for _, p := range missing {
		total += p.Size
	}
	if err := s.room(total); err != nil {
		return nil, err
	}
	if err := s.mkdir(s.blob("")); err != nil {
		return nil, err
	}
	done := int64(0)
	for _, p := range missing {
		if err := s.write(s.blob(p.SHA256), show.reader(ctx, b.reader(p, b.Index.nameOf(p)), &done, total)); err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 {
		if err := atomicfile.SyncDir(s.blob("")); err != nil {
			return nil, err
		}
	}
	return s, s.files()
}

func (b *File) staged(dataDir string) *Staged {
	return &Staged{file: b, dataDir: dataDir, short: b.Index.ID()[:16], blobs: map[string]bool{}}
}

// Missing returns how many bytes of images Stage would copy. It returns an error where Stage would refuse the bundle.
func (b *File) Missing(ctx context.Context, dataDir, architecture string) (size int64, err error) {
	s := b.staged(dataDir)
	parts, err := s.missing(ctx, architecture)
	if err != nil {
		return 0, err
	}
	for _, p := range parts {
		size += p.Size
	}
	before := s.filesBefore()
	for _, items := range [][]Item{b.Index.Manifests, b.Index.Charts} {
		for _, it := range items {
			if _, ok := before[it.SHA256]; b.Index.content(it.SHA256).Absent && !ok {
				return 0, &BaseError{b.Path, "the file " + it.Name}
			}
		}
	}
	return size, s.room(size)
}

// Differs reports whether another bundle than this one is installed in a data directory, or none.
func (b *File) Differs(dataDir string) (bool, error) { return b.staged(dataDir).changes() }

func (s *Staged) layout() string { return filepath.Join(s.dataDir, "images", LayoutName) }

func (s *Staged) blob(sha string) string { return filepath.Join(s.layout(), "blobs", "sha256", sha) }

func (s *Staged) folder(name ...string) string {
	return filepath.Join(append([]string{s.dataDir, folderName}, name...)...)
}

// explain says in one sentence why the contents could not be written.
func (s *Staged) explain(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("the file system of %s is full, and the bundle was not installed; free some space and run the command again", s.dataDir)
	}
	return err
}

// Abort removes what Stage has written. Contents that were there before stay.
func (s *Staged) Abort() error {
	var errs []error
	for i := len(s.made) - 1; i >= 0; i-- {
		if err := os.Remove(s.made[i]); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			errs = append(errs, err)
		}
	}
	s.made = nil
	return errors.Join(errs...)
}

// mkdir makes a folder with its parents.
func (s *Staged) mkdir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if parent := filepath.Dir(dir); parent != dir {
		if err := s.mkdir(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	s.made = append(s.made, dir)
	return nil
}

func (s *Staged) write(path string, r io.Reader) error {
	_, err := os.Lstat(path)
	if err := writeFile(path, 0o644, r); err != nil {
		return err
	}
	if errors.Is(err, fs.ErrNotExist) {
		s.made = append(s.made, path)
	}
	return nil
}

// missing returns the parts of images that the machine needs and does not have.
func (s *Staged) missing(ctx context.Context, architecture string) (all []Part, err error) {
	for _, img := range s.file.Index.Images {
		parts, err := blobsOf(ctx, staging{s}, img, []string{architecture})
		if err != nil {
			return nil, err
		}
		for _, d := range parts {
			sha := d.Digest.Encoded()
			if s.blobs[sha] {
				continue
			}
			s.blobs[sha] = true
			if p := s.file.Index.content(sha); !s.has(p) {
				all = append(all, *p)
			}
		}
	}
	return all, nil
}

// has reports whether the layout has a content. Its hash was verified when it was written.
func (s *Staged) has(p *Part) bool {
	st, err := os.Lstat(s.blob(p.SHA256))
	return err == nil && st.Mode().IsRegular() && st.Size() == p.Size
}

// staging reads parts of images: those in the bundle, and those that only the machine has.
type staging struct{ *Staged }

func (s staging) open(d v1.Descriptor) (io.ReadCloser, int64, error) {
	b := s.file
	part := b.Index.content(d.Digest.Encoded())
	switch {
	case part == nil:
		return nil, 0, fs.ErrNotExist
	case !part.Absent:
		return io.NopCloser(b.reader(*part, b.Index.nameOf(*part))), part.Size, nil
	case !s.has(part):
		return nil, 0, &BaseError{b.Path, "the part sha256:" + part.SHA256[:12] + " of an image"}
	}
	f, err := os.Open(s.blob(part.SHA256))
	return f, part.Size, err
}

// room returns an error if the contents do not fit. The node needs the space a second time, for the unpacked images.
func (s *Staged) room(size int64) error {
	if size == 0 {
		return nil
	}
	for dir := s.layout(); ; dir = filepath.Dir(dir) {
		var free unix.Statfs_t
		err := unix.Statfs(dir, &free)
		if errors.Is(err, unix.ENOENT) && dir != "/" {
			continue
		}
		has, needs := int64(free.Bavail)*free.Bsize, 2*size+stagingSpare
		if err == nil && has < needs {
			return &SpaceError{s.dataDir, needs, has}
		}
		return err
	}
}

// files writes manifests and charts into the folder of the bundle.
func (s *Staged) files() error {
	x := s.file.Index
	if _, err := os.Stat(s.folder(s.short, installedName)); err == nil && s.current() == s.short {
		return nil
	}
	if err := os.RemoveAll(s.folder(s.short)); err != nil { // of a run that was interrupted
		return err
	}
	before := s.filesBefore()
	for folder, items := range map[string][]Item{"manifests": x.Manifests, "charts": x.Charts} {
		if err := s.mkdir(s.folder(s.short, folder)); err != nil {
			return err
		}
		for _, it := range items {
			if err := s.item(it, s.folder(s.short, folder, it.Name), before); err != nil {
				return err
			}
		}
	}
	data, err := json.MarshalIndent(installed{s.file.Index.ID(), x.Manifests, x.Charts}, "", "  ")
	if err != nil {
		return err
	}
	return s.write(s.folder(s.short, installedName), bytes.NewReader(data))
}

// item writes one file.
func (s *Staged) item(it Item, path string, before map[string]string) error {
	p := s.file.Index.content(it.SHA256)
	if !p.Absent {
		return s.write(path, s.file.reader(*p, it.Name))
	}
	f, err := os.Open(before[it.SHA256])
	if err != nil {
		return &BaseError{s.file.Path, "the file " + it.Name}
	}
	defer f.Close()
	r := s.file.reader(*p, it.Name).(*checked)
	r.r = f
	r.wrong = func(string) error { return &BaseError{s.file.Path, "the file " + it.Name} }
	return s.write(path, r)
}

// current returns the name of the folder of the installed bundle, or an empty text.
func (s *Staged) current() string {
	name, err := os.Readlink(s.folder(currentName))
	if err != nil {
		return ""
	}
	return name
}

// filesBefore returns the paths of the files of the installed bundle, by their hashes.
func (s *Staged) filesBefore() map[string]string {
	paths := map[string]string{}
	data, err := atomicfile.ReadSmall(s.folder(currentName, installedName), maxIndex)
	var i installed
	if err != nil || json.Unmarshal(data, &i) != nil {
		return paths // a file that is needed is reported as missing
	}
	for folder, items := range map[string][]Item{"manifests": i.Manifests, "charts": i.Charts} {
		for _, it := range items {
			if validName(it.Name) {
				paths[it.SHA256] = s.folder(currentName, folder, it.Name)
			}
		}
	}
	return paths
}

// changes reports whether Commit would change something that the node reads.
func (s *Staged) changes() (bool, error) {
	var index []byte
	if all := s.file.Index.Images; len(all) > 0 {
		var err error
		if index, err = layoutIndex(all); err != nil {
			return false, err
		}
	}
	have, err := os.ReadFile(filepath.Join(s.layout(), v1.ImageIndexFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	return s.current() != s.short || !bytes.Equal(have, index), nil
}

// Commit makes the contents those of the installed bundle, and removes what only earlier bundles had.
func (s *Staged) Commit() error {
	if all := s.file.Index.Images; len(all) > 0 {
		if err := writeLayout(s.layout(), all); err != nil {
			return s.explain(err)
		}
	} else if err := os.Remove(filepath.Join(s.layout(), v1.ImageIndexFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if s.current() != s.short {
		tmp := s.folder(".tmp-" + currentName)
		if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(s.short, tmp); err != nil {
			return s.explain(err)
		}
		if err := os.Rename(tmp, s.folder(currentName)); err != nil {
			return err
		}
		if err := atomicfile.SyncDir(s.folder()); err != nil {
			return err
		}
	}
	s.made = nil
	return s.clean()
}

// clean removes folders of other bundles, and parts of images that no image needs.
func (s *Staged) clean() error {
	entries, err := os.ReadDir(s.folder())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != s.short && e.Name() != currentName {
			if err := os.RemoveAll(s.folder(e.Name())); err != nil {
				return err
			}
		}
	}
	if entries, err = os.ReadDir(s.blob("")); err != nil {
		return err
	}
	for _, e := range entries {
		if !s.blobs[e.Name()] {
			if err := os.Remove(s.blob(e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
