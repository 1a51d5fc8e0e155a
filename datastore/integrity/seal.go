package integrity

import (
	"encoding/json"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"kedge/internal/atomicfile"
)

// Paths of the files in the store's directory.
const (
	logDir       = "member/wal"
	databaseFile = "member/snap/db"
	// SealFile exists while the store is closed, if it was closed in order.
	SealFile = "sealed.json"
)

// seal is the content of the file. It does not cover etcd's snapshot files, which etcd writes and never reads.
type seal struct {
	Files map[string]sealed `json:"files"` // by path in the store's directory
	Sum   string            `json:"sum"`   // checksum of Files
}

type sealed struct {
	Size int64  `json:"size"`
	CRC  uint32 `json:"crc32c"`
}

func (s seal) sum() string {
	data, err := json.Marshal(s.Files) // maps are sorted
	if err != nil {
		panic(err) // such a map can always be encoded
	}
	return strconv.FormatUint(uint64(crc32.Checksum(data, castagnoli)), 16)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli) // for which processors have an instruction

// Seal writes the checksums of the files of the store in dir, which was closed in order. The caller keeps the returned sum
// for [Check].
func Seal(dir string) (sum string, err error) {
	names, err := sealedNames(dir)
	if err != nil {
		return "", err
	}
	s := seal{Files: map[string]sealed{}}
	for _, name := range names {
		if s.Files[name], err = sumOf(filepath.Join(dir, name)); err != nil {
			return "", err
		}
	}
	s.Sum = s.sum()
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return "", err
	}
	return s.Sum, atomicfile.Write(filepath.Join(dir, SealFile), append(data, '\n'), 0o600)
}

// sealedNames returns the files of a store that etcd reads when it opens the store.
func sealedNames(dir string) ([]string, error) {
	files, err := logFiles(filepath.Join(dir, logDir))
	if err != nil {
		return nil, err
	}
	names := []string{databaseFile}
	for _, f := range files {
		names = append(names, filepath.Join(logDir, filepath.Base(f.path)))
	}
	return names, nil
}

func sumOf(path string) (sealed, error) {
	f, err := os.Open(path)
	if err != nil {
		return sealed{}, err
	}
	defer f.Close()
	sum := crc32.New(castagnoli)
	n, err := io.CopyBuffer(sum, struct{ io.Reader }{f}, make([]byte, 1<<20))
	return sealed{Size: n, CRC: sum.Sum32()}, err
}

// Report is the result of Check.
type Report struct {
	Sealed bool   // the store was closed in order, and no byte has changed since
	Torn   string // log file with a torn end, which was overwritten with zeros
	// SealInvalid means that there was a seal, but it is damaged or not that of the last stop.
	SealInvalid bool

	Identity Identity // to which the log belongs
	// Members holds the IDs of the members in the database; only if there was no valid seal.
	Members []string
}

// Known is what the caller knows of a store besides its files. The zero value is for a caller that knows nothing.
type Known struct {
	// Seal is the result of the last Seal. An older kedge, which knows no seals and may have run since, drops it.
	Seal string
	// Newest is the name of the newest file of the log that was seen; empty if none was. A file that is missing at the end of the
	// log cannot be told from one that never was.
	Newest string
	// Opened means that the store was completely opened whenever etcd has begun to open it. Until then the last file of the
	// log may be shorter than it was allocated: etcd cuts it off behind the last record, and allocates the rest anew.
	Opened bool
	// Segment is the size with which the files of the log are allocated.
	Segment int64
}

// Check checks the files of the store in dir, which is closed, and removes the seal, so that the store may be opened. An
// error that is a *[Damage] names the damaged file.
func Check(dir string, known Known) (Report, error) {
	var r Report
	s, err := readSeal(dir)
	switch {
	case errors.Is(err, errSealDamaged), err == nil && s.Sum != known.Seal:
		r.SealInvalid = true
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return r, err
	default:
		r.Sealed = true
	}
	if r.Sealed {
		err = s.check(dir)
	} else {
		err = r.read(dir, known)
	}
	if err != nil {
		return r, err
	}
	if r.Identity, err = ReadIdentity(dir); err != nil {
		return r, err
	}
	if err := os.Remove(filepath.Join(dir, SealFile)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return r, err
	}
	// The removal must be on disk before any write, which makes the seal invalid.
	return r, atomicfile.SyncDir(dir)
}

var errSealDamaged = errors.New("the seal is damaged")

func readSeal(dir string) (s seal, err error) {
	data, err := os.ReadFile(filepath.Join(dir, SealFile))
	if err != nil {
		return s, err
	}
	if json.Unmarshal(data, &s) != nil || s.Sum != s.sum() || len(s.Files) == 0 {
		return s, errSealDamaged
	}
	return s, nil
}

// check compares the files with the seal.
func (s seal) check(dir string) error {
	names, err := sealedNames(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if _, ok := s.Files[name]; !ok {
			return damaged(filepath.Join(dir, name), "did not exist when the store was closed")
		}
	}
	for name := range s.Files {
		if !slices.Contains(names, name) {
			return damaged(filepath.Join(dir, name), "is missing")
		}
	}
	for _, name := range names {
		path, was := filepath.Join(dir, name), s.Files[name]
		is, err := sumOf(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return damaged(path, "is missing")
		case err != nil:
			return err
		case is.Size == 0 && was.Size > 0:
			return damaged(path, "is empty")
		case is.Size != was.Size:
			return damaged(path, "has %d bytes, and had %d when the store was closed", is.Size, was.Size)
		case is.CRC != was.CRC:
			return damaged(path, "has changed since the store was closed")
		}
	}
	return nil
}

// read checks all files without a seal.
func (r *Report) read(dir string, known Known) error {
	path := filepath.Join(dir, databaseFile)
	c, err := readContents(path)
	if errors.Is(err, fs.ErrNotExist) {
		return damaged(path, "is missing")
	}
	if err != nil {
		return err
	}
	l, err := readLog(filepath.Join(dir, logDir), known)
	if err != nil {
		return err
	}
	if err := l.agrees(c, filepath.Join(dir, logDir)); err != nil {
		return err
	}
	r.Torn, r.Members = l.torn, c.members
	return l.clear()
}

// agrees returns the damage of the log in dir if it lacks what the database or its own hard state names.
func (l *log) agrees(c *contents, dir string) error {
	switch {
	case l.known && c.index > l.last:
		return damaged(dir, "ends at entry %d, and the database holds entry %d already", l.last, c.index)
	case l.known && l.commit > l.last:
		return damaged(dir, "ends at entry %d, but entry %d was committed", l.last, l.commit)
	}
	return nil
}
