// Package hostpaths has the folders of the kubelet that other programs expect at fixed paths of the host:
// volumes and sockets for CSI drivers, and container logs for log collectors.
//
// It has the paths, and a lock, because only one node of a machine can use the host's folders. It imports
// nothing of the kubelet. Only package agent imports it.
package hostpaths

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Places are the kubelet's folders.
type Places struct {
	Kubelet  string // root directory
	PodLogs  string
	LogLinks string // links to the logs, with names of container and pod
}

// Below returns the folders of a node that keeps everything in its data directory.
func Below(dataDir string) Places {
	log := filepath.Join(dataDir, "log")
	return Places{filepath.Join(dataDir, "kubelet"), filepath.Join(log, "pods"), filepath.Join(log, "containers")}
}

// Standard returns the folders that manifests of CSI drivers and log collectors contain.
func Standard() Places { return Places{"/var/lib/kubelet", "/var/log/pods", "/var/log/containers"} }

// lockName is the lock file of a node that uses the host's folders.
const lockName = "kedge.lock"

// Claim makes sure that the folders use can be used: that no pod of the node has its volumes in the folders
// other, and that no other node uses the host's folders. release gives up the claim.
func Claim(use, other Places, ofHost bool) (release func() error, err error) {
	if has, err := hasPods(other.Kubelet); err != nil {
		return nil, err
	} else if has && !ofHost {
		// The host's folders may belong to another kubelet, unless kedge has used them.
		if _, err := os.Stat(filepath.Join(other.Kubelet, lockName)); errors.Is(err, fs.ErrNotExist) {
			has = false
		} else if isLocked(other.Kubelet) {
			has = false // by another node of this machine
		}
		if has {
			return nil, movedError(other.Kubelet)
		}
	} else if has {
		return nil, movedError(other.Kubelet)
	}
	if !ofHost {
		return func() error { return nil }, nil
	}
	path := filepath.Join(use.Kubelet, lockName)
	if err := os.MkdirAll(use.Kubelet, 0o750); err != nil {
		return nil, fmt.Errorf("prepare the kubelet's directory: %w", err)
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if has, err := hasPods(use.Kubelet); err != nil {
			return nil, err
		} else if has {
			return nil, fmt.Errorf("%s contains pods of another kubelet; remove that kubelet and the directory, or leave out --host-paths", use.Kubelet)
		}
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the kubelet's directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("another node of this machine uses %s; only one node can have --host-paths", use.Kubelet)
		}
		return nil, errors.Join(err, f.Close())
	}
	return f.Close, nil
}

func movedError(from string) error {
	return fmt.Errorf("pods of this node have their volumes in %s, which a change of --host-paths would leave behind; "+
		"run \"kedge killall\", remove %s, and start again, or leave --host-paths as it was", from, filepath.Join(from, "pods"))
}

// isLocked reports whether a process has locked a directory.
func isLocked(dir string) bool {
	f, err := os.Open(filepath.Join(dir, lockName))
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// hasPods reports whether a kubelet's directory contains files of a pod.
func hasPods(dir string) (bool, error) {
	entries, err := os.ReadDir(filepath.Join(dir, "pods"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for pods: %w", err)
	}
	return len(entries) > 0, nil
}
