package bundle

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"syscall"
)

// File is an open bundle whose index has been checked.
type File struct {
	Path  string
	Index *Index

	f         *os.File
	size      int64
	raw       []byte // the index as it was signed
	signature []byte
}

// Open opens a bundle and checks its index. It returns [ErrNone] for a kedge without a bundle, and a [*DamagedError] for
// a bundle that is cut off. What the index lists is verified when it is read.
func Open(path string) (_ *File, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would block
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file; name the file of a bundle", path)
	}
	b := &File{Path: path, f: f, size: st.Size()}
	if err := b.readIndex(); err != nil {
		return nil, err
	}
	return b, nil
}

// Close closes the file.
func (b *File) Close() error { return b.f.Close() }

func (b *File) damaged(format string, args ...any) error {
	return &DamagedError{b.Path, fmt.Sprintf(format, args...)}
}

func (b *File) readIndex() error {
	last := make([]byte, min(int64(trailerSize), b.size))
	if _, err := b.f.ReadAt(last, b.size-int64(len(last))); err != nil {
		return err
	}
	t, err := parseTrailer(last, b.size)
	if errors.Is(err, errNoTrailer) {
		return b.without()
	}
	if err != nil {
		return b.damaged("%v", err)
	}
	at := b.size - int64(trailerSize) - t.signature - t.index
	both := make([]byte, t.index+t.signature)
	if _, err := b.f.ReadAt(both, at); err != nil {
		return err
	}
	if sha256.Sum256(both) != t.sum {
		return b.damaged("its index is not the one that was written")
	}
	b.raw, b.signature = both[:t.index:t.index], both[t.index:]
	b.Index, err = parseIndex(b.raw, at)
	var newer *NewerError
	if errors.As(err, &newer) {
		newer.Path = b.Path
		return newer
	}
	if err != nil {
		return b.damaged("%v", err)
	}
	return nil
}

// without returns the error for a file that does not end as a bundle does.
func (b *File) without() error {
	p, err := readELF(b.f, b.size)
	switch {
	case err == nil && p.size == b.size:
		return ErrNone
	case err == nil:
		return b.damaged("its end is missing")
	case errors.Is(err, errNotELF):
		return fmt.Errorf("%s is not a bundle, or is cut off", b.Path)
	}
	return b.damaged("%v", err)
}

// Executable returns the executable for an architecture.
func (b *File) Executable(architecture string) (Executable, error) {
	for _, e := range b.Index.Executables {
		if e.Architecture == architecture {
			return e, nil
		}
	}
	return Executable{}, &ArchitectureError{b.Path, architecture, b.Index.Architectures()}
}

// reader returns the content of a part. At its end the reader returns a [*DamagedError] in place of [io.EOF] if the
// content is not the one in the index.
func (b *File) reader(p Part, what string) io.Reader {
	return &checked{r: io.NewSectionReader(b.f, p.Offset, p.Size), sum: sha256.New(), left: p.Size, want: p.SHA256, wrong: func(reason string) error {
		return b.damaged("%s %s", what, reason)
	}}
}

// checked is a reader of a content with a known hash.
type checked struct {
	r     io.Reader
	sum   hash.Hash
	left  int64
	want  string
	wrong func(reason string) error
}

func (c *checked) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.sum.Write(p[:n])
	c.left -= int64(n)
	if errors.Is(err, io.EOF) {
		switch {
		case c.left != 0:
			return n, c.wrong("is cut off")
		case hex.EncodeToString(c.sum.Sum(nil)) != c.want:
			return n, c.wrong("is not what was written")
		}
	}
	return n, err
}

// Progress is told how many of all bytes were done. It is called often.
type Progress func(done, total int64)

// reader returns a reader that tells its progress, and ends with ctx.
func (p Progress) reader(ctx context.Context, r io.Reader, done *int64, total int64) io.Reader {
	return readerFunc(func(buf []byte) (int, error) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		n, err := r.Read(buf)
		*done += int64(n)
		if p != nil {
			p(*done, total)
		}
		return n, err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// Verify reads the whole bundle and compares it with its index.
func (b *File) Verify(ctx context.Context, show Progress) error {
	done := int64(0)
	total := b.size - int64(trailerSize) - int64(len(b.raw)) - int64(len(b.signature))
	for _, p := range b.Index.parts() {
		if _, err := io.Copy(io.Discard, show.reader(ctx, b.reader(p, b.Index.nameOf(p)), &done, total)); err != nil {
			return err
		}
	}
	return nil
}

// nameOf returns what a part is, for messages.
func (x *Index) nameOf(p Part) string {
	for _, e := range x.Executables {
		if e.SHA256 == p.SHA256 {
			return "the executable for " + e.Architecture
		}
	}
	for _, items := range [][]Item{x.Manifests, x.Charts} {
		for _, it := range items {
			if it.SHA256 == p.SHA256 {
				return it.Name
			}
		}
	}
	if x.Head != nil && x.Head.SHA256 == p.SHA256 {
		return "the script at its begin"
	}
	return "the part sha256:" + p.SHA256[:12] + " of an image"
}

// VerifyExecutable reads an executable of the bundle and compares it with the index.
func (b *File) VerifyExecutable(e Executable) error {
	_, err := io.Copy(io.Discard, b.reader(e.Part, b.Index.nameOf(e.Part)))
	return err
}
