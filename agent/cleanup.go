package agent

import (
	"context"
	"errors"

	"kedge/agent/cgroup"
	"kedge/internal/mounts"
)

// Cleanup detaches the volumes that the kubelet has mounted and removes the pods'
// cgroups. The containers must have ended. What is stored in volumes stays.
func Cleanup(ctx context.Context, cfg Config) error {
	return errors.Join(mounts.DetachBelow(cfg.kubeletDir()), removeCgroup(ctx, cfg.SystemdCgroups, cfg.CgroupRoot))
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
