// Package datadir guards the data directory: only one kedge at a time uses it, of the same
// node, and of a version that is not older than the version that wrote it. The package also
// records the latest time that was ever seen, so that a clock that is years behind is noticed.
// It guards the run directory too, because two nodes in one would remove each other's sockets.
//
// The content of the directories belongs to the components, each of which has a folder of its
// own. Packages assembly, appliance and the launcher import the package.
package datadir

import (
	"context"
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
	"kedge/internal/fswatch"
)

// Format is the version of the directory's layout. It grows when older versions of kedge could
// not work with the new layout.
const Format = 1

// Errors of a data directory. Each is wrapped with its remedy.
var (
	ErrInUse     = errors.New("the data directory is in use")
	ErrRunInUse  = errors.New("the run directory is in use")
	ErrOtherNode = errors.New("the data directory belongs to another node")
	ErrNewer     = errors.New("the data directory was written by a newer kedge")
	ErrReadOnly  = errors.New("the data directory cannot be written")
	ErrDamaged   = errors.New("the data directory's description cannot be read")
)

// Description is the content of the directory's file kedge.json.
type Description struct {
	Format   int       `json:"format"`
	Version  string    `json:"version"`  // of the last kedge
	NodeName string    `json:"nodeName"` // owner of the directory
	LastSeen time.Time `json:"lastSeen"` // the latest time that was seen
	// Store says that the directory had a datastore in use: a missing datastore is lost then, and must not be
	// replaced by an empty one.
	Store bool `json:"store,omitempty"`
	// Joined says that the directory's server has joined other servers, and so has their settings in a file: without
	// the file it must not go on with settings of its own.
	Joined bool `json:"joined,omitempty"`
	// External is the directory's part in an external datastore, in place of one of its own.
	External External `json:"external,omitempty"`
}

// External is a server's part in an external datastore.
type External string

// The parts. The empty External means none.
const (
	ExternalUsed    External = "used"    // the cluster's objects are there
	ExternalRemoved External = "removed" // the server was removed from the cluster
)

// Dir is an open data directory with its run directory. Close it when all users of both have
// stopped.
type Dir struct {
	path  string
	run   string // the run directory; empty if it is the data directory
	locks []*os.File
	desc  Description

	existed bool
}

const (
	descriptionFile = "kedge.json"
	lockFile        = "kedge.lock"
)

// Open makes the directories if necessary, takes their locks, and checks that the data
// directory belongs to this node before it writes to it. version is this kedge's, for the
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
	if filepath.Clean(runDir) == filepath.Clean(d.path) { // possible for a server without a node
		return d.claim(nodeName, version, now)
	}
	d.run = runDir
	holder, err = d.take(runDir)
	switch {
	case errors.Is(err, unix.EWOULDBLOCK):
		return fmt.Errorf("%w: another kedge (process %s) runs with %s; stop it, or choose another with --run-dir", ErrRunInUse, holder, runDir)
	case err != nil:
		return fmt.Errorf("the run directory cannot be written: %w; make it writable, or choose another with --run-dir", err)
	}
	return d.claim(nodeName, version, now)
}

// TryLock takes the lock of an existing data directory without opening it. The caller closes the file to release the lock.
// The error wraps [ErrInUse] while a kedge runs with the directory.
func TryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(path, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := holderIn(f)
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w: another kedge (process %s) runs with %s", ErrInUse, holder, path)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Guard watches the run directory until ctx ends. It cannot prevent the directory's removal.
// After a removal it calls removed and takes the lock of the new directory, so that no other
// kedge does.
func (d *Dir) Guard(ctx context.Context, removed func(dir string)) error {
	if d.run == "" {
		<-ctx.Done()
		return nil
	}
	for {
		if fswatch.Removed(ctx, filepath.Join(d.run, lockFile)) == "" {
			return nil
		}
		removed(d.run)
		if holder, err := d.take(d.run); errors.Is(err, unix.EWOULDBLOCK) {
			return fmt.Errorf("%w: the run directory %s was removed, and another kedge (process %s) uses it now; stop that kedge", ErrRunInUse, d.run, holder)
		} else if err != nil {
			return fmt.Errorf("lock the run directory again after its removal: %w", err)
		}
	}
}

// Unwritable returns the error of a directory in which a write failed with err.
func Unwritable(path string, err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("%w: %s: the disk is full; free some space", ErrReadOnly, path)
	}
	return fmt.Errorf("%w: %w; make it writable, or choose another with --data-dir", ErrReadOnly, err)
}

// take makes a directory and takes its lock, which d holds from then on. If another process
// holds the lock, the error is EWOULDBLOCK and holder is that process.
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
	// Only for the message that names the process, for which a full disk has no room.
	if err := f.Truncate(0); err != nil {
		return "", err
	}
	if _, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())), 0); errors.Is(err, unix.ENOSPC) {
		err = nil
	}
	return "", err
}

// holderIn returns the process that holds the lock, if known.
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
		return fmt.Errorf("%w: %s belongs to node %q, and this node is %q; use --node-name %s, or choose another with --data-dir", ErrOtherNode, d.path, d.desc.NodeName, nodeName, d.desc.NodeName)
	}
	d.existed = d.desc.NodeName != ""
	d.desc.Format, d.desc.Version, d.desc.NodeName = Format, version, nodeName
	err := d.saw(now)
	if d.existed && errors.Is(err, unix.ENOSPC) {
		return nil // an existing node starts on a full disk, without the update of the file
	}
	if err != nil {
		return Unwritable(d.path, err)
	}
	return nil
}

func (d *Dir) read() error {
	data, err := os.ReadFile(filepath.Join(d.path, descriptionFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // first boot
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	err = json.Unmarshal(data, &d.desc)
	if err == nil && d.desc.NodeName == "" {
		err = errors.New("it does not name a node")
	}
	if err != nil {
		return fmt.Errorf("%w: %s: %w; remove the file if the directory belongs to this node", ErrDamaged, filepath.Join(d.path, descriptionFile), err)
	}
	return nil
}

// NodeName returns the node that a data directory belongs to; empty for none yet.
func NodeName(path string) (string, error) {
	d := &Dir{path: path}
	err := d.read()
	return d.desc.NodeName, err
}

// Read returns the description of a data directory; the zero Description if it is nobody's yet.
func Read(path string) (Description, error) {
	d := &Dir{path: path}
	err := d.read()
	return d.desc, err
}

// LastSeen returns the latest time that was ever seen on this node; zero at first boot.
func (d *Dir) LastSeen() time.Time { return d.desc.LastSeen }

// Existed reports whether the directory belonged to a node before it was opened.
func (d *Dir) Existed() bool { return d.existed }

// HadStore reports whether the directory had a datastore in use.
func (d *Dir) HadStore() bool { return d.desc.Store }

// NoteStore records that the directory has a datastore in use.
func (d *Dir) NoteStore() error { return d.setStore(true) }

// ForgetStore records that the directory has no datastore any more, and gets a new one.
func (d *Dir) ForgetStore() error { return d.setStore(false) }

func (d *Dir) setStore(has bool) error { return d.set(&d.desc.Store, has) }

// External returns the directory's part in an external datastore.
func (d *Dir) External() External { return d.desc.External }

// SetExternal records the directory's part in an external datastore.
func (d *Dir) SetExternal(to External) error {
	from := d.desc.External
	if from == to {
		return nil
	}
	d.desc.External = to
	if err := d.save(); err != nil {
		d.desc.External = from
		return Unwritable(d.path, err)
	}
	return nil
}

// HasJoined reports whether the directory's server has joined other servers.
func (d *Dir) HasJoined() bool { return d.desc.Joined }

// NoteJoined records that the directory's server has joined other servers.
func (d *Dir) NoteJoined() error { return d.set(&d.desc.Joined, true) }

// set changes a field of the description and writes it.
func (d *Dir) set(field *bool, to bool) error {
	if *field == to {
		return nil
	}
	*field = to
	if err := d.save(); err != nil {
		*field = !to
		return Unwritable(d.path, err)
	}
	return nil
}

// saw records that the time is at least now.
func (d *Dir) saw(now time.Time) error {
	if now.After(d.desc.LastSeen) {
		d.desc.LastSeen = now.UTC().Truncate(time.Second)
	}
	return d.save()
}

func (d *Dir) save() error {
	data, err := json.Marshal(d.desc)
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(filepath.Join(d.path, descriptionFile), append(data, '\n'), 0o644)
	return err
}

// Close releases the locks.
func (d *Dir) Close() error {
	var errs []error
	for _, f := range d.locks {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
