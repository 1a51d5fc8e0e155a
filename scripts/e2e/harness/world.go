package harness

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
)

// World is how a node's process sees the machine, where that differs from what the
// test sees. The test's own program enters it and becomes kedge.
type World struct {
	Without  []uintptr // capabilities
	ReadOnly []string  // folders
	// Changes takes what is written to the folders of the machine below it: each is
	// covered by an overlay whose upper layer is Changes/upper/FOLDER. What is below
	// Keep is seen as it is.
	Changes string
	Keep    string
	Cgroups []string // folders of control groups that the process enters
	Umask   int      // 0 for the test's
	Nohup   bool     // SIGHUP is ignored
}

const worldVar = "KEDGE_E2E_WORLD"

// Command is kedge with args in this world, and nil for the machine as it is.
func (w *World) Command(env []string, args ...string) *exec.Cmd {
	cmd := exec.Command(Binary(), args...)
	cmd.Env = env
	if w == nil {
		return cmd
	}
	if env == nil {
		cmd.Env = os.Environ()
	}
	data, err := json.Marshal(w)
	if err != nil {
		panic(err)
	}
	cmd.Path = "/proc/self/exe"
	cmd.Env = append(cmd.Env, worldVar+"="+string(data))
	return cmd
}

// enterWorld is what the test's program does in place of its tests when it is started
// by [World.Command]. It returns only when it fails.
func enterWorld(text string) error {
	var w World
	if err := json.Unmarshal([]byte(text), &w); err != nil {
		return err
	}
	if err := os.Unsetenv(worldVar); err != nil {
		return err
	}
	goruntime.LockOSThread() // all that follows is of this thread, and so is what it becomes
	for _, dir := range w.Cgroups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter the control group: %w", err)
		}
	}
	if len(w.ReadOnly) > 0 || w.Changes != "" {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
	}
	for _, dir := range w.ReadOnly {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", dir, err)
		}
		if err := unix.MountSetattr(unix.AT_FDCWD, dir, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
			return fmt.Errorf("make %s read-only: %w", dir, err)
		}
	}
	if w.Changes != "" {
		if err := w.overlay(); err != nil {
			return err
		}
	}
	if w.Umask != 0 {
		unix.Umask(w.Umask)
	}
	if w.Nohup {
		signal.Ignore(unix.SIGHUP)
	}
	for _, c := range w.Without {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return unix.Exec(Binary(), os.Args, os.Environ())
}

// Watched are the folders of the machine in which programs leave things.
var Watched = []string{"/bin", "/boot", "/etc", "/home", "/lib", "/media", "/mnt", "/opt", "/root", "/run", "/sbin", "/srv", "/tmp", "/usr", "/var"}

func (w World) overlay() error {
	for _, dir := range Watched {
		if st, err := os.Lstat(dir); err != nil || !st.IsDir() {
			continue // a link to one of the others
		}
		upper, work := filepath.Join(w.Changes, "upper", dir), filepath.Join(w.Changes, "work", dir)
		if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755)); err != nil {
			return err
		}
		keep := -1
		if rel, err := filepath.Rel(dir, w.Keep); err == nil && filepath.IsLocal(rel) {
			if keep, err = unix.OpenTree(unix.AT_FDCWD, w.Keep, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE); err != nil {
				return fmt.Errorf("keep %s: %w", w.Keep, err)
			}
		}
		if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
			return fmt.Errorf("overlay on %s: %w", dir, err)
		}
		if keep >= 0 {
			if err := unix.MoveMount(keep, "", unix.AT_FDCWD, w.Keep, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
				return fmt.Errorf("keep %s: %w", w.Keep, err)
			}
		}
	}
	return nil
}

// NewNetwork makes a network namespace for a node, which Destroy closes: loopback and, where address is not
// empty, an interface with that address and no route beyond its own network.
func NewNetwork(t *testing.T, address string) *namespaces.Network {
	t.Helper()
	ns, err := namespaces.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	err = ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil || address == "" {
			return err
		}
		pair := netlink.NewVeth(netlink.NewLinkAttrs())
		pair.Name, pair.PeerName = "up0", "up1"
		if err := netlink.LinkAdd(pair); err != nil {
			return err
		}
		for _, name := range []string{"up0", "up1"} {
			l, err := netlink.LinkByName(name)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetUp(l); err != nil {
				return err
			}
			if name == "up0" {
				a, err := netlink.ParseAddr(address)
				if err != nil {
					return err
				}
				if err := netlink.AddrAdd(l, a); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// Inside calls f in the node's network namespace.
func (n *Node) Inside(f func() error) error {
	if n.Network == nil {
		return f()
	}
	return n.Network.Do(f)
}

// Dial connects from where the node is.
func (n *Node) Dial(network, address string) (conn net.Conn, err error) {
	err = n.Inside(func() error {
		conn, err = net.Dial(network, address)
		return err
	})
	return conn, err
}
