package agent

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/google/cadvisor/lib/container/containerd"
	cadvisorapi "github.com/google/cadvisor/lib/model"
	"golang.org/x/sys/unix"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/features"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
	"k8s.io/kubernetes/pkg/kubelet/cm"
)

// ownFilesystems is cAdvisor with file system sizes from statfs on the directory itself.
//
// cAdvisor reads the mount table once, when it is created, and uses one mount point per device. On overlayfs
// and tmpfs that may be any mount point, and with the native snapshotter it is a container's root or a layer
// that is being unpacked: when that mount point is removed, the kubelet ends, or no longer detects full disks.
type ownFilesystems struct {
	cadvisor.Interface
	root string // the kubelet's directory
}

// newCAdvisor creates cAdvisor as upstream's app.Run would.
func (k *Kubelet) newCAdvisor(ctx context.Context) (cadvisor.Interface, error) {
	s, logger := k.server, klog.FromContext(ctx)
	roots := []string{cm.NodeAllocatableRoot(s.CgroupRoot, s.CgroupsPerQOS, s.CgroupDriver)}
	own, err := cm.GetKubeletContainer(logger, s.KubeletCgroups)
	if err != nil {
		k.log.Debug("the kubelet's own cgroup is unknown; metrics will not include it", "err", err)
	}
	for _, group := range []string{own, s.RuntimeCgroups, s.SystemCgroups} {
		if group != "" {
			roots = append(roots, group)
		}
	}
	// Without the endpoint the metrics of containers lack their names, pods and images. The variable is a flag
	// of cAdvisor, global for the process.
	*containerd.ArgContainerdEndpoint = k.cfg.RuntimeEndpoint
	// The containerd in this process supports PodSandboxStats, which is all that upstream checks.
	fromRuntime := utilfeature.DefaultFeatureGate.Enabled(features.PodAndContainerStatsFromCRI)
	c, err := cadvisor.New(logger, cadvisor.NewImageFsInfoProvider(s.ContainerRuntimeEndpoint), s.RootDirectory, roots,
		cadvisor.UsingLegacyCadvisorStats(s.ContainerRuntimeEndpoint), s.LocalStorageCapacityIsolation, fromRuntime)
	if err != nil {
		return nil, fmt.Errorf("create cAdvisor: %w", err)
	}
	return ownFilesystems{c, s.RootDirectory}, nil
}

// RootFsInfo implements cadvisor.Interface.
func (f ownFilesystems) RootFsInfo() (cadvisorapi.FsInfo, error) { return f.GetDirFsInfo(f.root) }

// GetDirFsInfo implements cadvisor.Interface. Device is the device number, because device names are only
// compared; Mountpoint is the directory.
func (f ownFilesystems) GetDirFsInfo(dir string) (cadvisorapi.FsInfo, error) {
	var file unix.Stat_t
	if err := unix.Stat(dir, &file); err != nil {
		return cadvisorapi.FsInfo{}, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return cadvisorapi.FsInfo{}, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	block := uint64(fs.Frsize)
	return cadvisorapi.FsInfo{
		Timestamp:  time.Now(),
		Device:     fmt.Sprintf("%d:%d", unix.Major(file.Dev), unix.Minor(file.Dev)),
		Mountpoint: dir,
		Capacity:   fs.Blocks * block,
		Available:  fs.Bavail * block,
		Usage:      (fs.Blocks - fs.Bfree) * block,
		Inodes:     &fs.Files,
		InodesFree: &fs.Ffree,
	}, nil
}
