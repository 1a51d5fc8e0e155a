package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"
)

const (
	// headerName and databaseName are the first and the last entry of the tar archive. The files are between them, below
	// filesFolder.
	headerName   = "snapshot.json"
	databaseName = "datastore.db"
	filesFolder  = "server/"

	// maxFile bounds a file, and maxFiles the number of files. Keys, certificates and settings are far smaller.
	maxFile, maxFiles = 4 << 20, 1000
	// window is the memory of the compression, in bytes.
	window = 1 << 20
)

// Write writes an archive: the header, whose fields Format and OpenedBy it sets, files by their path below the server's
// directory, and a database of the size in the header. It fails if the database is not the one of the header.
func Write(w io.Writer, h Header, lock Lock, files map[string][]byte, database io.Reader) error {
	h.Format, h.OpenedBy = Format, lock.Name()
	line, err := h.encode()
	if err != nil {
		return err
	}
	to, err := lock.recipient()
	if err != nil {
		return err
	}
	if _, err := io.WriteString(w, magic+string(line)); err != nil {
		return err
	}
	encrypted, err := age.Encrypt(w, to)
	if err != nil {
		return err
	}
	compressed, err := zstd.NewWriter(encrypted, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return err
	}
	t := tar.NewWriter(compressed)
	if err := writeEntries(t, h, line, files, database); err != nil {
		return errors.Join(err, compressed.Close())
	}
	return errors.Join(t.Close(), compressed.Close(), encrypted.Close())
}

func writeEntries(t *tar.Writer, h Header, line []byte, files map[string][]byte, database io.Reader) error {
	begin := func(name string, size int64) error {
		return t.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o600, ModTime: h.Taken, Format: tar.FormatPAX})
	}
	put := func(name string, data []byte) error {
		if err := begin(name, int64(len(data))); err != nil {
			return err
		}
		_, err := t.Write(data)
		return err
	}
	if err := put(headerName, line); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if !localName(name) || len(files[name]) > maxFile {
			return fmt.Errorf("%q cannot be in a snapshot", name)
		}
		if err := put(filesFolder+name, files[name]); err != nil {
			return err
		}
	}
	if err := begin(databaseName, h.Database); err != nil {
		return err
	}
	sum := sha256.New()
	if _, err := io.CopyN(io.MultiWriter(t, sum), database, h.Database); err != nil {
		return fmt.Errorf("copy the database: %w", err)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != h.Hash {
		return errors.New("the database has changed while it was copied")
	}
	return nil
}

// Content is what an archive holds, but for its database.
type Content struct {
	Header
	Files map[string][]byte // by their path below the server's directory
}

// Read reads an archive to its end, and writes its database to w. Until Read has returned without an error nothing of it may be
// used: only the end shows that it is whole. The error wraps ErrWrongKey if another lock has closed the archive.
func Read(r io.Reader, lock Lock, w io.Writer) (Content, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	h, line, err := readHeader(in)
	if err != nil {
		return Content{}, err
	}
	decrypted, err := decrypt(in, h, lock)
	if err != nil {
		return Content{}, err
	}
	decompressed, err := zstd.NewReader(decrypted, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(window))
	if err != nil {
		return Content{}, err
	}
	defer decompressed.Close()
	c, err := readEntries(tar.NewReader(decompressed), h, line, w)
	if err == nil {
		err = readEnd(decompressed, decrypted)
	}
	if err != nil {
		return Content{}, err
	}
	return c, nil
}

// decrypt returns what the lock opens.
func decrypt(in io.Reader, h Header, lock Lock) (io.Reader, error) {
	with, err := lock.identity()
	if err != nil {
		return nil, err
	}
	out, err := age.Decrypt(in, with)
	var none *age.NoIdentityMatchError
	switch {
	case errors.As(err, &none) && h.OpenedBy == PassphraseName && lock.Name() == PassphraseName:
		return nil, fmt.Errorf("%w, or it is damaged: it has another passphrase", ErrWrongKey)
	case errors.As(err, &none) && h.OpenedBy == lock.Name():
		return nil, fmt.Errorf("%w: the key is right, and does not open it", ErrDamaged)
	case errors.As(err, &none):
		return nil, fmt.Errorf("%w: %s opens it, and this is %s", ErrWrongKey, h.OpenedBy, lock.Name())
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return out, nil
}

// outputError marks an error of the writer that gets the database, which is no damage of the archive.
type outputError struct{ error }

func (e outputError) Unwrap() error { return e.error }

type output struct{ io.Writer }

func (o output) Write(p []byte) (int, error) {
	n, err := o.Writer.Write(p)
	if err != nil {
		err = outputError{err}
	}
	return n, err
}

func readEntries(t *tar.Reader, h Header, line []byte, w io.Writer) (Content, error) {
	c := Content{Header: h, Files: map[string][]byte{}}
	for first := true; ; first = false {
		e, err := t.Next()
		switch {
		case errors.Is(err, io.EOF):
			return c, fmt.Errorf("%w: it has no database", ErrDamaged)
		case err != nil:
			return c, fmt.Errorf("%w: %w", ErrDamaged, err)
		case first != (e.Name == headerName) || e.Typeflag != tar.TypeReg:
			return c, fmt.Errorf("%w: %q is not expected there", ErrDamaged, e.Name)
		}
		if e.Name == databaseName {
			return c, readDatabase(t, e.Size, h, w)
		}
		name, isFile := strings.CutPrefix(e.Name, filesFolder)
		if !first && (!isFile || !localName(name)) || e.Size > maxFile || len(c.Files) == maxFiles {
			return c, fmt.Errorf("%w: %q is not expected there", ErrDamaged, e.Name)
		}
		data, err := io.ReadAll(t)
		switch {
		case err != nil:
			return c, fmt.Errorf("%w: %w", ErrDamaged, err)
		case !first:
			c.Files[name] = data
		case !bytes.Equal(data, line):
			return c, fmt.Errorf("%w: its header was changed", ErrDamaged)
		}
	}
}

func readDatabase(t io.Reader, size int64, h Header, w io.Writer) error {
	if size != h.Database {
		return fmt.Errorf("%w: its database has %d bytes instead of %d", ErrDamaged, size, h.Database)
	}
	sum := sha256.New()
	_, err := io.Copy(io.MultiWriter(sum, output{w}), t)
	var failed outputError
	switch {
	case errors.As(err, &failed):
		return failed.error
	case err != nil:
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	case hex.EncodeToString(sum.Sum(nil)) != h.Hash:
		return fmt.Errorf("%w: its database is not the one that was saved", ErrDamaged)
	}
	return nil
}

// readEnd makes sure that nothing is missing at the end, and that nothing follows.
func readEnd(decompressed, decrypted io.Reader) error {
	// The end of a tar archive is two blocks of zeros, and perhaps more.
	rest, err := io.ReadAll(io.LimitReader(decompressed, 1<<20))
	if err == nil && len(bytes.Trim(rest, "\x00")) > 0 {
		err = errors.New("something follows the database")
	}
	if err == nil {
		_, err = io.Copy(io.Discard, decrypted)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

// localName reports whether a name can be that of a file below a folder.
func localName(name string) bool {
	return name != "" && filepath.IsLocal(name) && path.Clean(name) == name && !strings.ContainsAny(name, "\\\x00\n")
}
