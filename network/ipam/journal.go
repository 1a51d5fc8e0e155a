package ipam

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
)

const (
	journalName    = "leases.journal"
	journalVersion = 1

	// compactAfter is how many entries beyond those needed the journal may
	// hold before it is rewritten: a few hundred kilobytes of memory at most.
	compactAfter = 2048
)

// entry is one line of the journal. Exactly one field is set, but for the
// first line, which has Version and Boot.
type entry struct {
	Version int          `json:"version,omitempty"`
	Boot    string       `json:"boot,omitempty"`
	Add     *Lease       `json:"add,omitempty"`
	Del     string       `json:"del,omitempty"`   // owner
	Freed   []netip.Addr `json:"freed,omitempty"` // oldest first; written by compaction
}

// file is what the journal needs of an open file; a test injects faults here.
type file interface {
	io.Writer
	Truncate(size int64) error
	Close() error
}

// journal is an append-only file of entries, one JSON text a line.
//
// An entry counts when its line is complete, newline included. An append that
// fails is cut off again; where even that fails the journal is broken, and the
// next append rewrites it from memory first.
type journal struct {
	path   string
	create func(path string) (file, error) // new and empty, for appending

	f       file
	size    int64 // of the complete lines
	entries int   // since the last rewrite, beyond those it needed
	broken  bool
}

func createFile(path string) (file, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
}

// load reads the journal of this boot. One of another boot, or none, gives no
// entries. An unreadable line in the middle is an error: the leases after it
// cannot be known, and handing out their addresses would break the promise.
func load(path, boot string) ([]entry, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// What follows the last newline was never acknowledged.
	data = data[:bytes.LastIndexByte(data, '\n')+1]
	var entries []entry
	for i, line := range bytes.Split(data, []byte{'\n'}) {
		if len(line) == 0 {
			continue
		}
		var e entry
		err := json.Unmarshal(line, &e)
		if i == 0 {
			// A head that is damaged is of another boot: within one, the head
			// is complete before the file gets its name.
			if err != nil || e.Boot != boot || e.Version != journalVersion {
				return nil, nil
			}
			continue
		}
		if err != nil {
			return entries, fmt.Errorf("%w: line %d of %s: %w", ErrDamaged, i+1, path, err)
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// rewrite replaces the journal by one that holds just these entries. The old
// one stays in force until the new one is complete.
func (j *journal) rewrite(entries []entry) error {
	next := j.path + ".next"
	f, err := j.create(next)
	if err != nil {
		return err
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	for _, e := range entries {
		if err := enc.Encode(e); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	size := int64(buf.Len())
	if _, err := f.Write(buf.Bytes()); err != nil {
		return errors.Join(err, f.Close(), os.Remove(next))
	}
	if err := os.Rename(next, j.path); err != nil {
		return errors.Join(err, f.Close(), os.Remove(next))
	}
	if j.f != nil {
		j.f.Close() // read and written no more; nothing to lose
	}
	j.f, j.size, j.entries, j.broken = f, size, 0, false
	return nil
}

// append adds one entry durably, as far as durability is promised here.
func (j *journal) append(e entry) error {
	line, err := json.Marshal(e)
	if err != nil {
		return err
	}
	line = append(line, '\n')
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
