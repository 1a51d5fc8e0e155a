package runtime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kedge/internal/mounts"
)

// StopAllPods stops and removes every pod through the CRI, with each pod's grace period, while the kedge
// process runs. The kubelet must not be running, or it starts the pods again.
func StopAllPods(ctx context.Context, socket string) error {
	return withClient(socket, func(client *containerd.Client) error {
		pods := cri.NewRuntimeServiceClient(connection(client))
		list, err := pods.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		errs := make(chan error)
		for _, pod := range list.Items {
			go func() {
				_, err := pods.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod.Id})
				if err == nil {
					_, err = pods.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod.Id})
				}
				if err != nil {
					err = fmt.Errorf("stop pod %s/%s: %w", pod.Metadata.GetNamespace(), pod.Metadata.GetName(), err)
				}
				errs <- err
			}()
		}
		var failed error
		for range list.Items {
			failed = errors.Join(failed, <-errs)
		}
		return failed
	})
}

// KillAll kills every container and shim of this node, without containerd and while no kedge process runs, and
// removes their mounts and their files under RunDir. Images stay. It does not touch the network's rules, links
// and addresses, nor the kubelet's cgroups. It may be called again after an interruption.
func KillAll(ctx context.Context, c Config, log *slog.Logger) error {
	unlock, err := lockNode(c)
	if err != nil {
		return err
	}
	defer unlock()
	return killAll(ctx, c, log)
}

func killAll(ctx context.Context, c Config, log *slog.Logger) error {
	// runc has no record of containers whose run directory was removed.
	strays, err := straysOf(c)
	if err == nil {
		err = killTrees(strays)
	}
	if err != nil {
		return fmt.Errorf("end containers without a record: %w", err)
	}
	shims, err := killShims(c)
	if err != nil {
		return fmt.Errorf("end shims: %w", err)
	}
	containers, err := deleteContainers(ctx, c)
	if err != nil {
		return fmt.Errorf("end containers: %w", err)
	}
	for _, dir := range []string{c.state(), c.tempDir(), filepath.Join(c.root(), "io.containerd.snapshotter.v1."+SnapshotterOverlayFS)} {
		if err := mounts.DetachBelow(dir); err != nil {
			return err
		}
	}
	log.Info("ended all pods", "shims", shims+len(strays), "containers", containers)
	return errors.Join(os.RemoveAll(c.state()), emptyDir(c.shimSocketDir()), os.RemoveAll(c.runcRoot()), os.RemoveAll(c.cniCache()))
}

// shimsOf returns the PIDs of the shims that this node has unpacked.
func shimsOf(c Config) ([]int, error) {
	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return nil, err
	}
	var shims []int
	for _, exe := range programs {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(exe)))
		if err == nil && isShim(c, pid) {
			shims = append(shims, pid)
		}
	}
	return shims, nil
}

func isShim(c Config, pid int) bool {
	target, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && strings.HasPrefix(target, c.payloadRoot()+"/") && strings.Contains(filepath.Base(target), programShim) && hasOurRoot(pid)
}

// hasOurRoot reports whether paths of a process mean what they mean to us. The shims of nodes in containers, and in machines
// of throwaway clusters, are at the same path below another root.
func hasOurRoot(pid int) bool {
	ours, err := os.Stat("/")
	if err != nil {
		return false
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/root", pid))
	return err == nil && os.SameFile(ours, theirs)
}

// killShims kills the shims of this node and returns their number. A process that reuses a PID is safe: the
// pidfd refers to one process, and isShim is called after the pidfd was opened.
func killShims(c Config) (int, error) {
	shims, err := shimsOf(c)
	if err != nil {
		return 0, err
	}
	killed := 0
	for _, pid := range shims {
		handle, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has exited meanwhile
		}
		if isShim(c, pid) {
			if err := unix.PidfdSendSignal(handle, unix.SIGKILL, nil, 0); err == nil {
				killed++
				waitExit(handle, 10*time.Second)
			}
		}
		unix.Close(handle)
	}
	return killed, nil
}

// waitExit returns when the process of a pidfd has exited, or after limit.
func waitExit(pidfd int, limit time.Duration) {
	deadline := time.Now().Add(limit)
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return
		}
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != unix.EINTR {
			return
		}
	}
}

// deleteContainers makes runc kill and delete every container of which it has a record. runc knows the cgroups
// of the containers, and so finds processes that left their parent.
func deleteContainers(ctx context.Context, c Config) (int, error) {
	records, err := filepath.Glob(filepath.Join(c.runcRoot(), "*", "*", "state.json"))
	if err != nil || len(records) == 0 {
		return 0, err
	}
	p, err := embeddedPayload()
	if err != nil {
		return 0, err
	}
	bin, err := p.unpack(c.payloadRoot())
	if err != nil {
		return 0, err
	}
	errs := make([]error, len(records))
	var group errgroup.Group
	group.SetLimit(8) // each mostly waits for its processes to exit
	for i, record := range records {
		group.Go(func() error {
			dir := filepath.Dir(record)
			cmd := exec.CommandContext(ctx, filepath.Join(bin, programRunc), "--root", filepath.Dir(dir), "delete", "--force", filepath.Base(dir))
			if out, err := cmd.CombinedOutput(); err != nil {
				errs[i] = fmt.Errorf("%s: %w: %s", filepath.Base(dir), err, strings.TrimSpace(string(out)))
			}
			return nil
		})
	}
	group.Wait()
	return len(records), errors.Join(errs...)
}

func emptyDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(append(errs, err)...)
}
