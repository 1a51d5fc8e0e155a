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

// StopAllPods stops and removes every pod through the CRI, with the time each is
// given to end, while the kedge process runs. The kubelet must not be running, or
// it starts them again.
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

// KillAll ends every container and shim of this node at once, without containerd
// and while no kedge process runs, and removes their mounts and what they left under
// RunDir. Images stay. The network's share (rules, links, addresses) and the kubelet's
// cgroups are not its business. It may be called again after it was interrupted.
func KillAll(ctx context.Context, c Config, log *slog.Logger) error {
	unlock, err := lockNode(c)
	if err != nil {
		return err
	}
	defer unlock()
	return killAll(ctx, c, log)
}

func killAll(ctx context.Context, c Config, log *slog.Logger) error {
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
	log.Info("ended all pods", "shims", shims, "containers", containers)
	return errors.Join(os.RemoveAll(c.state()), emptyDir(c.shimSocketDir()), os.RemoveAll(c.runcRoot()), os.RemoveAll(c.cniCache()))
}

// killShims ends the processes that run a shim unpacked by this node. A process
// that takes over a number between being looked at and being killed is safe: the
// handle is to the process, and is looked at after it is held.
func killShims(c Config) (int, error) {
	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return 0, err
	}
	killed := 0
	for _, exe := range programs {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(exe)))
		if err != nil {
			continue
		}
		handle, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // gone meanwhile
		}
		target, err := os.Readlink(exe)
		if err == nil && strings.HasPrefix(target, c.payloadRoot()+"/") && strings.Contains(filepath.Base(target), programShim) {
			if err := unix.PidfdSendSignal(handle, unix.SIGKILL, nil, 0); err == nil {
				killed++
				waitEnd(handle, 10*time.Second)
			}
		}
		unix.Close(handle)
	}
	return killed, nil
}

// waitEnd returns when the process behind a pidfd has ended, or after limit.
func waitEnd(pidfd int, limit time.Duration) {
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

// deleteContainers lets runc end every container it has a record of: it knows their
// cgroups, and so finds processes that left their parent.
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
	group.SetLimit(8) // each waits for its processes to be gone, hardly working
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
