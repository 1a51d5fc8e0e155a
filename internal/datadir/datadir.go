// Package datadir guards the data directory: one running kedge at a time, of
// the same node, and not of an older version than the one that wrote it. It also
// keeps the latest time that was ever seen, so that a clock that is years behind
// is noticed. The run directory it guards too, for two nodes with one would remove each
// other's sockets.
//
// It is not for what is in the directories: each part has a folder of its own.
// Only package main and the launcher import it.
package datadir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
)

// Format is the version of the directory's layout. It grows when an older kedge
// could not work with what a newer one wrote.
const Format = 1

// What can be wrong with a data directory. Each is wrapped with a sentence that
// says what to do.
var (
	ErrInUse     = errors.New("the data directory is in use")
	ErrRunInUse  = errors.New("the run directory is in use")
	ErrOtherNode = errors.New("the data directory belongs to another node")
	ErrNewer     = errors.New("the data directory was written by a newer kedge")
	ErrReadOnly  = errors.New("the data directory cannot be written")
	ErrDamaged   = errors.New("the data directory's description cannot be read")
)

// Description is kept in the file kedge.json of the directory.
type Description struct {
	Format   int       `json:"format"`
	Version  string    `json:"version"`  // of the kedge that wrote last
	NodeName string    `json:"nodeName"` // whose directory it is
	LastSeen time.Time `json:"lastSeen"` // the latest time that was seen
}

// Dir is an open data directory with the run directory that goes with it. Close it when
// everything that uses them has stopped.
type Dir struct {
	path  string
	locks []*os.File
	desc  Description
}

const (
	descriptionFile = "kedge.json"
	lockFile        = "kedge.lock"
)

// Open makes the directories if need be, takes their locks and checks that the data
// directory is ours, which is not written before. version is this kedge's own, for the
// description.
func Open(path, runDir, nodeName, version string, now time.Time) (*Dir, error) {
	d := &Dir{path: path}
	if err := d.open(runDir, nodeName, version, now); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Dir) open(runDir, nodeName, version string, now time.Time) error {
	holder, err := d.take(d.path)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return fmt.Errorf("%w: another kedge (process %s) runs with %s; stop it, or choose another with --data-dir", ErrInUse, holder, d.path)
	case err != nil:
		return Unwritable(d.path, err)
	}
	if filepath.Clean(runDir) == filepath.Clean(d.path) { // which a server without a node may have
		return d.claim(nodeName, version, now)
	}
	holder, err = d.take(runDir)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return fmt.Errorf("%w: another kedge (process %s) runs with %s; stop it, or choose another with --run-dir", ErrRunInUse, holder, runDir)
	case err != nil:
		return fmt.Errorf("the run directory cannot be written: %w; make it writable, or choose another with --run-dir", err)
	}
	return d.claim(nodeName, version, now)
}

// Unwritable is the error of a directory in which err kept us from writing.
func Unwritable(path string, err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("%w: %s: the disk is full; free some space", ErrReadOnly, path)
	}
	return fmt.Errorf("%w: %w; make it writable, or choose another with --data-dir", ErrReadOnly, err)
}

// take makes a directory and takes its lock, which d holds from then on. Where another
// process has it, the error is EWOULDBLOCK, and holder that process.
func (d *Dir) take(dir string) (holder string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", err
	}
	d.locks = append(d.locks, f)
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return holderIn(f), fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	// Only for the message that names us.
	if err := f.Truncate(0); err != nil {
		return "", err
	}
	_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0)
	return "", err
}

// holderIn is the process that has the lock, as far as it is known.
func holderIn(lock *os.File) string {
	b := make([]byte, 20)
	n, _ := lock.ReadAt(b, 0)
	if pid := strings.TrimSpace(string(b[:n])); pid != "" {
		return pid
	}
	return "unknown"
}

func (d *Dir) claim(nodeName, version string, now time.Time) error {
	if err := d.read(); err != nil {
		return err
	}
	switch {
	case d.desc.Format > Format:
		return fmt.Errorf("%w: %s was written by %s; run that version or a later one, or choose another with --data-dir", ErrNewer, d.path, d.desc.Version)
	case d.desc.NodeName != "" && d.desc.NodeName != nodeName:
		return fmt.Errorf("%w: %s is of node %q and this is %q; use --node-name %s, or choose another with --data-dir", ErrOtherNode, d.path, d.desc.NodeName, nodeName, d.desc.NodeName)
	}
	d.desc.Format, d.desc.Version, d.desc.NodeName = Format, version, nodeName
	return d.Saw(now)
}

func (d *Dir) read() error {
	data, err := os.ReadFile(filepath.Join(d.path, descriptionFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // first boot
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := json.Unmarshal(data, &d.desc); err != nil {
		return fmt.Errorf("%w: %s: %w; remove that file if the directory is of this node", ErrDamaged, filepath.Join(d.path, descriptionFile), err)
	}
	return nil
}

// NodeName is the node whose data directory path is; empty where none has been yet.
func NodeName(path string) (string, error) {
	d := &Dir{path: path}
	err := d.read()
	return d.desc.NodeName, err
}

// LastSeen is the latest time that was ever seen on this node; zero at first boot.
func (d *Dir) LastSeen() time.Time { return d.desc.LastSeen }

// Saw notes that it is now at least this late, if that is news.
func (d *Dir) Saw(now time.Time) error {
	if now.After(d.desc.LastSeen) {
		d.desc.LastSeen = now.UTC().Truncate(time.Second)
	}
	data, err := json.Marshal(d.desc)
	if err != nil {
		return err
	}
	if _, err := atomicfile.WriteIfChanged(filepath.Join(d.path, descriptionFile), append(data, '\n'), 0o644); err != nil {
		return Unwritable(d.path, err)
	}
	return nil
}

// Close gives the locks back.
func (d *Dir) Close() error {
	var errs []error
	for _, f := range d.locks {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
