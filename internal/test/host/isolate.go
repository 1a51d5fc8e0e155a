package host

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// isolatedVar marks a test program that runs in namespaces of its own.
const isolatedVar = "KEDGE_TEST_ISOLATED"

// Isolate continues the test program in network and mount namespaces of its own: a machine with nothing but a loopback
// interface, whose leftovers disappear when the test program ends in any way. It is for packages that change the machine's
// own network, and is called first in TestMain. Without root the tests run without namespaces, and tests that need root
// skip themselves.
func Isolate() {
	if os.Geteuid() == 0 && os.Getenv(isolatedVar) == "" {
		err := isolate() // returns only when it fails
		fmt.Fprintln(os.Stderr, "tests run without namespaces of their own:", err)
	}
	if os.Getenv(isolatedVar) != "" {
		if err := loopbackUp(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}

// RequireIsolation skips the test unless it may change the network around it:
// see [Isolate].
func RequireIsolation(t testing.TB) {
	t.Helper()
	RequireRoot(t)
	if os.Getenv(isolatedVar) == "" {
		t.Skip("needs a network namespace for the test program: changes the machine's own network")
	}
}

// isolate replaces the process by itself in new namespaces. The thread that
// calls exec is the one that the new program starts with.
func isolate() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("create namespaces: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// /sys shows the interfaces of the namespace in which it was mounted.
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), isolatedVar+"=1"))
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}
