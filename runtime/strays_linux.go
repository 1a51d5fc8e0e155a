package runtime

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// killStrays kills the pods of shims that cannot be reached any more, because their address was removed from
// the run directory. containerd would not know of these pods, and they would hold their ports, addresses and
// volumes, which the pods that replace them need. The effect is that of a reboot.
func killStrays(c Config, log *slog.Logger) error {
	strays, err := straysOf(c)
	if err != nil || len(strays) == 0 {
		return err
	}
	log.Error("the run directory was removed under running pods, or files in it: the pods are killed and started again, as after a reboot", keyPath, c.RunDir, "pods", len(strays))
	return killTrees(strays)
}

// straysOf returns the PIDs of this node's shims that cannot be reached.
func straysOf(c Config) ([]int, error) {
	shims, err := shimsOf(c)
	if err != nil {
		return nil, err
	}
	var strays []int
	for _, pid := range shims {
		bundle, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
		if err == nil && !reachable(bundle) {
			strays = append(strays, pid)
		}
	}
	return strays, nil
}

// killTrees kills processes with all their descendants.
func killTrees(roots []int) error {
	tree, err := descendants(roots)
	if err != nil {
		return err
	}
	// Shims are last, because they reap their descendants.
	for _, pid := range slices.Concat(tree, roots) {
		handle, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has exited meanwhile
		}
		// The PID may have been reused; the new process then has another parent.
		if now, err := descendants(roots); err == nil && (slices.Contains(now, pid) || slices.Contains(roots, pid)) {
			if err := unix.PidfdSendSignal(handle, unix.SIGKILL, nil, 0); err == nil {
				waitExit(handle, 10*time.Second)
			}
		}
		unix.Close(handle)
	}
	return nil
}

// reachable reports whether a bundle contains the address of its shim, and the socket exists.
func reachable(bundle string) bool {
	text, err := os.ReadFile(filepath.Join(bundle, "bootstrap.json"))
	if err != nil {
		return !os.IsNotExist(err)
	}
	var bootstrap struct {
		Address string `json:"address"`
	}
	if err := json.Unmarshal(text, &bootstrap); err != nil {
		return true // containerd reports the damage
	}
	socket, err := url.Parse(bootstrap.Address)
	if err != nil || socket.Scheme != "unix" {
		return true
	}
	_, err = os.Stat(socket.Path)
	return !os.IsNotExist(err)
}

// descendants returns the PIDs of all descendants of processes, parents before their children.
func descendants(of []int) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // it has exited meanwhile
		}
		// The process name, in parentheses, may contain any character.
		_, rest, _ := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " ")
		if fields := strings.Fields(rest); len(fields) > 1 {
			if parent, err := strconv.Atoi(fields[1]); err == nil {
				children[parent] = append(children[parent], pid)
			}
		}
	}
	var found []int
	for next := slices.Clone(of); len(next) > 0; {
		below := children[next[0]]
		found, next = append(found, below...), append(next[1:], below...)
	}
	return found, nil
}
