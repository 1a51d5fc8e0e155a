package ipam

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
)

const (
	journalName    = "leases.journal"
	journalVersion = 1

	// compactAfter is the number of superfluous entries after which the journal is
	// rewritten: a few hundred kilobytes of memory at most.
	compactAfter = 2048
)

// entry is one line of the journal. Exactly one field is set, except in the first line,
// which has Version and Boot. A checksum follows; see encodeLine.
type entry struct {
	Version int          `json:"version,omitempty"`
	Boot    string       `json:"boot,omitempty"`
	Add     *Lease       `json:"add,omitempty"`
	Del     string       `json:"del,omitempty"`   // owner
	Freed   []netip.Addr `json:"freed,omitempty"` // oldest first; written by compaction
}

// file is the part of an open file that the journal uses; a test injects faults here.
type file interface {
	io.Writer
	Truncate(size int64) error
	Close() error
}

// journal is an append-only file of entries, one JSON object for each line.
//
// An entry is valid when its line is complete, including the newline. A failed append is
// truncated; if that fails too, the journal is marked broken, and the next append rewrites
// it from memory first.
type journal struct {
	path   string
	boot   string
	create func(path string) (file, error) // new and empty, for appending

	f       file
	size    int64 // of the complete lines
	entries int   // since the last rewrite, beyond those it needed
	broken  bool
}

func createFile(path string) (file, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
}

// load reads the journal of this boot. A journal of another boot, or a missing one, has no
// entries. Damage is returned as an error together with the verified entries: those with a
// valid checksum, and, in a journal of a version without checksums, those before the
// damage.
func load(path, boot string) ([]entry, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	// Data after the last newline was never acknowledged.
	data = data[:bytes.LastIndexByte(data, '\n')+1]
	lines := bytes.Split(data, []byte{'\n'})
	head, sealed, err := decodeLine(lines[0], boot)
	if err == nil && head.Boot != "" && head.Boot != boot {
		return nil, nil
	}
	var damage error
	if err == nil && (head.Boot == "" || head.Version != journalVersion) {
		err = errors.New("missing journal header")
	}
	if err != nil {
		damage = fmt.Errorf("%w: line 1 of %s: %w", ErrDamaged, path, err)
		sealed = true // an entry without a checksum may belong to any boot
	}
	var entries []entry
	for i, line := range lines[1:] {
		if len(line) == 0 {
			continue
		}
		e, proven, err := decodeLine(line, boot)
		if err == nil && sealed && !proven {
			err = errors.New("no checksum")
		}
		if err == nil {
			entries = append(entries, e)
			continue
		}
		if damage == nil {
			damage = fmt.Errorf("%w: line %d of %s: %w", ErrDamaged, i+2, path, err)
		}
		if !sealed {
			break // the following entries cannot be verified
		}
	}
	return entries, damage
}

// A line ends with its checksum, as one more field of the object. The checksum covers the
// boot too, so that each line proves which boot it belongs to. Versions of kedge without
// checksums ignore the field.
const sumField = `,"sum":"%08x"}`

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(line []byte, boot string) uint32 {
	return crc32.Update(crc32.Checksum([]byte(boot), castagnoli), castagnoli, line)
}

// encodeLine returns an entry as a line of the journal.
func encodeLine(e entry, boot string) ([]byte, error) {
	text, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	text = text[:len(text)-1] // the brace comes after the checksum
	return fmt.Appendf(text, sumField+"\n", checksum(text, boot)), nil
}

// decodeLine parses a line; sealed reports that it has a valid checksum. The header of
// another boot has the checksum of that boot.
func decodeLine(line []byte, boot string) (e entry, sealed bool, err error) {
	var sum struct {
		Sum string `json:"sum"`
	}
	if err := errors.Join(json.Unmarshal(line, &e), json.Unmarshal(line, &sum)); err != nil {
		return entry{}, false, err
	}
	if sum.Sum == "" {
		return e, false, nil
	}
	if e.Boot != "" {
		boot = e.Boot
	}
	text, _ := bytes.CutSuffix(line, fmt.Appendf(nil, `,"sum":%q}`, sum.Sum))
	if fmt.Sprintf("%08x", checksum(text, boot)) != sum.Sum {
		return entry{}, false, errors.New("checksum mismatch")
	}
	return e, true, nil
}

// rewrite replaces the journal with one that has exactly these entries. The old journal
// stays valid until the new one is complete.
func (j *journal) rewrite(entries []entry) error {
	next := j.path + ".next"
	f, err := j.create(next)
	if err != nil {
		return err
	}
	var buf bytes.Buffer
	for _, e := range entries {
		line, err := encodeLine(e, j.boot)
		if err != nil {
			return errors.Join(err, f.Close())
		}
		buf.Write(line)
	}
	size := int64(buf.Len())
	if _, err := f.Write(buf.Bytes()); err != nil {
		return errors.Join(err, f.Close(), os.Remove(next))
	}
	if err := os.Rename(next, j.path); err != nil {
		return errors.Join(err, f.Close(), os.Remove(next))
	}
	if j.f != nil {
		j.f.Close() // the file is no longer used; an error has no effect
	}
	j.f, j.size, j.entries, j.broken = f, size, 0, false
	return nil
}

// append adds one entry with the durability that the package promises.
func (j *journal) append(e entry) error {
	line, err := encodeLine(e, j.boot)
	if err != nil {
		return err
	}
	if _, err := j.f.Write(line); err != nil {
		if cut := j.f.Truncate(j.size); cut != nil {
			j.broken = true
			err = errors.Join(err, cut)
		}
		return err
	}
	j.size += int64(len(line))
	j.entries++
	return nil
}

func (j *journal) close() error {
	if j.f == nil {
		return nil
	}
	return j.f.Close()
}

func journalPath(dir string) string { return filepath.Join(dir, journalName) }
