package agent

import (
	"errors"

	"kedge/agent/cgroup"
	"kedge/internal/mounts"
)

// Cleanup ends processes of pods that the runtime has lost track of, detaches the
// volumes that the kubelet has mounted and removes the pods' cgroups. The runtime
// must have ended its containers. What is stored in volumes stays.
func Cleanup(cfg Config) error {
	return errors.Join(cgroup.End(cfg.CgroupRoot), mounts.DetachBelow(cfg.kubeletDir()), cgroup.Remove(cfg.CgroupRoot))
}
