package preflight

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/cgroup"
	"kedge/internal/hostfirewall"
	"kedge/internal/mounts"
)

// probes has the functions by which checks look at the machine. Tests replace single functions.
type probes struct {
	readFile      func(path string) ([]byte, error)
	statfs        func(path string) (fsInfo, error)
	euid          func() int
	hostname      func() (string, error)
	now           func() time.Time
	clockSynced   func() (bool, error)
	openFileLimit func() (uint64, error)
	memoryLimit   func() (int64, bool)                      // of the control group of this process
	readable      func(path string) error                   // can be opened for reading
	writable      func(path string) error                   // can be opened for writing; nothing is written
	inPath        func(program string) error                // it can be run by its name
	tryFiles      func(dir string) error                    // files can be made in dir, which may not exist yet
	tryNamespace  func(flag int) error                      // a namespace of this kind can be made
	tryInotify    func(n int) error                         // n more instances can be made
	trySeccomp    func() error                              // filters are there
	tryOverlay    func(dir string) error                    // an overlay with its layers in dir can be mounted
	tryLink       func(kind string) error                   // an interface of this kind can be made
	tryNft        func(feature nftFeature) error            // rules that use a feature are accepted
	tryConntrack  func() error                              // connections are tracked
	dropsPods     func(Config) ([]hostfirewall.Drop, error) // chains that drop packets of pods
	defaultRoute  func() (bool, error)                      // there is a default route, of either family
	routes        func() ([]route, error)                   // of the main table, both families
	listen        func(network, address string) error       // the port is free
}

// fsInfo has the properties of a file system for checks.
type fsInfo struct {
	kind          int64 // magic number
	flags         int64 // ST_*
	size, free    uint64
	inodes, avail uint64
}

func realProbes() probes {
	return probes{
		readFile:      os.ReadFile,
		statfs:        statfs,
		euid:          os.Geteuid,
		hostname:      os.Hostname,
		now:           time.Now,
		clockSynced:   clockSynced,
		openFileLimit: openFileLimit,
		memoryLimit:   func() (int64, bool) { return cgroup.MemoryLimit("/proc/self/cgroup", "/sys/fs/cgroup") },
		readable:      func(path string) error { return tryOpen(path, os.O_RDONLY|unix.O_NONBLOCK) },
		writable:      func(path string) error { return tryOpen(path, os.O_WRONLY) },
		inPath:        func(program string) error { _, err := exec.LookPath(program); return err },
		tryFiles:      tryFiles,
		tryNamespace:  tryNamespace,
		tryInotify:    tryInotify,
		trySeccomp:    trySeccomp,
		tryOverlay:    func(dir string) error { return mounts.TryOverlay(existing(dir), trialFile) },
		tryLink:       tryLink,
		tryNft:        tryNft,
		tryConntrack:  tryConntrack,
		dropsPods:     dropsPods,
		defaultRoute:  defaultRoute,
		routes:        readRoutes,
		listen:        tryListen,
	}
}

func statfs(path string) (fsInfo, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(existing(path), &s); err != nil {
		return fsInfo{}, fmt.Errorf("statfs %s: %w", path, err)
	}
	block := uint64(s.Bsize)
	return fsInfo{
		kind: int64(s.Type), flags: int64(s.Flags),
		size: s.Blocks * block, free: s.Bavail * block,
		inodes: s.Files, avail: s.Ffree,
	}, nil
}

func tryOpen(path string, flags int) error {
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func openFileLimit() (uint64, error) {
	var l unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
	return l.Max, err // Go programs raise the soft limit to the hard limit by themselves
}

// clockSynced asks the kernel whether its clock is synchronized.
func clockSynced() (bool, error) {
	const timeError = 5 // TIME_ERROR
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	return state != timeError && t.Status&unix.STA_UNSYNC == 0, err
}

func tryListen(network, address string) error {
	if network == "udp" {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			return err
		}
		return c.Close()
	}
	l, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	return l.Close()
}
