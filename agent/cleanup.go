package agent

import (
	"context"
	"errors"

	"kedge/agent/cgroup"
	"kedge/internal/mounts"
)

// Cleanup ends processes of pods that the runtime has lost track of, detaches the
// volumes that the kubelet has mounted and removes the pods' cgroups. The runtime
// must have ended its containers. What is stored in volumes stays.
func Cleanup(ctx context.Context, cfg Config) error {
	root := cfg.CgroupRoot
	if cfg.SystemdCgroups {
		root = "/" + cgroup.Slice(root)
	}
	return errors.Join(cgroup.End(root), mounts.DetachBelow(cfg.kubeletDir()), removeCgroup(ctx, cfg.SystemdCgroups, cfg.CgroupRoot))
}

func ensureCgroup(ctx context.Context, systemd bool, root string) error {
	if systemd {
		return cgroup.EnsureSlice(ctx, root)
	}
	return cgroup.Ensure(root)
}

func removeCgroup(ctx context.Context, systemd bool, root string) error {
	if systemd {
		return cgroup.RemoveSlice(ctx, root)
	}
	return cgroup.Remove(root)
}
