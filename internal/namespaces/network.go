package namespaces

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotNetwork means that a path exists but is not a network namespace, such as the file that an
// unmounted bind mount leaves behind.
var ErrNotNetwork = errors.New("not a network namespace")

// Network is an open network namespace. The open file keeps it alive, so closing
// the last Network of a namespace without processes removes everything inside it.
type Network struct {
	file *os.File
	id   NetworkID
}

// NetworkID identifies a namespace on the machine until the next reboot. It shows whether a path was
// reused for another namespace.
type NetworkID struct {
	Dev uint64 `json:"dev"`
	Ino uint64 `json:"ino"`
}

// OpenNetwork opens the namespace at path.
func OpenNetwork(path string) (*Network, error) {
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

// MountedNetworks returns the paths at which network namespaces are mounted. Runtimes mount those of
// pods to keep them.
func MountedNetworks() ([]string, error) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var paths []string
	for line := range strings.Lines(string(table)) {
		// Number, parent, device, what of the file system is mounted, where, ...
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[3], "net:[") {
			paths = append(paths, unescape.Replace(f[4]))
		}
	}
	return paths, nil
}

// unescape undoes what the kernel does to paths in lists of mounts.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// CurrentNetwork opens the namespace of the calling thread, which is that of the
// process unless the caller is inside Do.
func CurrentNetwork() (*Network, error) {
	return OpenNetwork("/proc/thread-self/ns/net")
}

// NewNetwork creates an empty network namespace, with a loopback interface that is down.
func NewNetwork() (*Network, error) {
	var ns *Network
	err := onLockedThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		var err error
		ns, err = CurrentNetwork()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("create network namespace: %w", err)
	}
	return ns, nil
}

func fromFile(f *os.File) (*Network, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return nil, err
	}
	if fs.Type != unix.NSFS_MAGIC {
		return nil, ErrNotNetwork
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err == nil && kind != unix.CLONE_NEWNET {
		return nil, ErrNotNetwork
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	return &Network{file: f, id: NetworkID{Dev: st.Dev, Ino: st.Ino}}, nil
}

// ID returns the identity of the namespace.
func (n *Network) ID() NetworkID { return n.id }

// FD returns the file descriptor, valid until Close.
func (n *Network) FD() int { return int(n.file.Fd()) }

// Path returns a path that any process of this machine can open while this
// process has the namespace open.
func (n *Network) Path() string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd())
}

// Close releases the namespace.
func (n *Network) Close() error { return n.file.Close() }

// Do runs fn on a thread inside the namespace and returns its error. Sockets
// and processes that fn makes stay in the namespace afterwards; goroutines
// that fn starts do not run in it.
func (n *Network) Do(fn func() error) error {
	return onLockedThread(func() error {
		if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// onLockedThread runs fn, which may change the thread's network namespace, on a locked thread, and
// moves the thread back afterwards. If that fails the goroutine ends locked: the Go runtime
// then ends the thread, instead of handing it to other goroutines, which would use the wrong
// network without noticing.
func onLockedThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := CurrentNetwork()
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		finished := false
		defer func() {
			// fn may have ended the goroutine with runtime.Goexit, as testing.T.Fatal
			// does: still return an error, and still move the thread back.
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

// ProbeNetwork returns the identity of the namespace at path without keeping it open.
// The error is fs.ErrNotExist for a missing path, and ErrNotNetwork for another file.
func ProbeNetwork(path string) (NetworkID, error) {
	ns, err := OpenNetwork(path)
	if err != nil {
		return NetworkID{}, err
	}
	return ns.id, ns.Close()
}
