package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNotNetNS says that a path exists but does not name a network namespace:
// what a bind mount leaves behind once it has been undone.
var ErrNotNetNS = errors.New("not a network namespace")

// NS is an open network namespace. The open file keeps it alive, so closing
// the last NS of a namespace without processes removes everything inside it.
type NS struct {
	file *os.File
	id   ID
}

// ID tells one namespace from every other on the machine until reboot.
// A path can be reused for another namespace; an ID shows that it was.
type ID struct {
	Dev uint64 `json:"dev"`
	Ino uint64 `json:"ino"`
}

// Open opens the namespace that path names.
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	ns, err := fromFile(f)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open namespace %s: %w", path, err), f.Close())
	}
	return ns, nil
}

// Current opens the namespace of the calling thread, which is that of the
// process unless the caller is inside Do.
func Current() (*NS, error) {
	return Open("/proc/thread-self/ns/net")
}

// New creates an empty namespace, with a loopback interface that is down.
func New() (*NS, error) {
	var ns *NS
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		var err error
		ns, err = Current()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	return ns, nil
}

func fromFile(f *os.File) (*NS, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, err
	}
	if fs.Type != unix.NSFS_MAGIC {
		return nil, ErrNotNetNS
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err == nil && kind != unix.CLONE_NEWNET {
		return nil, ErrNotNetNS
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	return &NS{file: f, id: ID{Dev: st.Dev, Ino: st.Ino}}, nil
}

// ID returns the identity of the namespace.
func (n *NS) ID() ID { return n.id }

// FD returns the file descriptor, valid until Close.
func (n *NS) FD() int { return int(n.file.Fd()) }

// Path returns a path that any process of this machine can open while this
// process has the namespace open.
func (n *NS) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
}

// Close lets go of the namespace.
func (n *NS) Close() error { return n.file.Close() }

// Do runs fn on a thread inside the namespace and returns its error. Sockets
// and processes that fn makes stay in the namespace afterwards; goroutines
// that fn starts do not run in it.
func (n *NS) Do(fn func() error) error {
	return onThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// onThread runs fn, which may change the thread's network namespace, on a
// thread reserved for it, and puts the thread back where it was. A thread that
// cannot be put back is given up: its goroutine ends locked, which makes the Go
// runtime end the thread instead of handing it to other goroutines, who would
// then speak to the wrong network without noticing.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := Current()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		finished := false
		defer func() {
			// fn may have ended the goroutine with runtime.Goexit, as
			// testing.T.Fatal does: still answer, and still go home.
			if !finished {
				err = errors.New("function inside a network namespace did not return")
			}
			if back := unix.Setns(home.FD(), unix.CLONE_NEWNET); back == nil {
				runtime.UnlockOSThread()
			} else {
				err = errors.Join(err, fmt.Errorf("leave network namespace: %w", back))
			}
			done <- err
		}()
		err = fn()
		finished = true
	}()
	return <-done
}

// Probe returns the identity of the namespace at path without keeping it open.
// A path that is gone gives fs.ErrNotExist, one that names something else
// ErrNotNetNS.
func Probe(path string) (ID, error) {
	ns, err := Open(path)
	if err != nil {
		return ID{}, err
	}
	return ns.id, ns.Close()
}
