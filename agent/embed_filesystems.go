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

// ownFilesystems is cAdvisor with the size of a directory's file system asked of the
// kernel at that directory.
//
// cAdvisor reads the mount table once, when it is made, and takes one mount point for
// each device. On overlayfs and tmpfs that is the last one, or any, and with the native
// snapshotter it is a container's root or a layer that is being unpacked: the kubelet
// ends, or stops to see full disks, when that one goes.
type ownFilesystems struct {
	cadvisor.Interface
	root string // the kubelet's directory
}

// measure makes cAdvisor as upstream's app.Run would.
func (k *Kubelet) measure(ctx context.Context) (cadvisor.Interface, error) {
	s, logger := k.server, klog.FromContext(ctx)
	roots := []string{cm.NodeAllocatableRoot(s.CgroupRoot, s.CgroupsPerQOS, s.CgroupDriver)}
	own, err := cm.GetKubeletContainer(logger, s.KubeletCgroups)
	if err != nil {
		k.log.Debug("the kubelet's own control group is not known: metrics lack it", "err", err)
	}
	for _, group := range []string{own, s.RuntimeCgroups, s.SystemCgroups} {
		if group != "" {
			roots = append(roots, group)
		}
	}
	// Without it the metrics of containers lack their names, pods and images. It is a flag
	// of cAdvisor's, a package variable, and every kubelet of a process has the same one.
	*containerd.ArgContainerdEndpoint = k.cfg.RuntimeEndpoint
	// The containerd in this process knows PodSandboxStats, the one thing upstream asks.
	fromRuntime := utilfeature.DefaultFeatureGate.Enabled(features.PodAndContainerStatsFromCRI)
	c, err := cadvisor.New(logger, cadvisor.NewImageFsInfoProvider(s.ContainerRuntimeEndpoint), s.RootDirectory, roots,
		cadvisor.UsingLegacyCadvisorStats(s.ContainerRuntimeEndpoint), s.LocalStorageCapacityIsolation, fromRuntime)
	if err != nil {
		return nil, fmt.Errorf("prepare the measuring of containers: %w", err)
	}
	return ownFilesystems{c, s.RootDirectory}, nil
}

// RootFsInfo implements cadvisor.Interface.
func (f ownFilesystems) RootFsInfo() (cadvisorapi.FsInfo, error) { return f.GetDirFsInfo(f.root) }

// GetDirFsInfo implements cadvisor.Interface. The device has a number for its name, which
// is only compared; the mount point is the directory.
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
