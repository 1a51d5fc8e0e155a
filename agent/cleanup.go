package agent

import (
	"errors"

	"kedge/agent/cgroup"
	"kedge/internal/mounts"
)

// Cleanup detaches the volumes that the kubelet has mounted and removes the pods'
// cgroups. The containers must have ended. What is stored in volumes stays.
func Cleanup(cfg Config) error {
	return errors.Join(mounts.DetachBelow(cfg.kubeletDir()), cgroup.Remove(cfg.CgroupRoot))
}
