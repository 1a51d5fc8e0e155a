package agent

import (
	"errors"

	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"

	"kedge/agent/cgroup"
	"kedge/agent/stalesocket"
	"kedge/internal/mounts"
)

// Cleanup ends processes of pods that the runtime has lost track of, detaches the
// volumes that the kubelet has mounted and removes the pods' cgroups. The runtime
// must have ended its containers. What is stored in volumes stays.
//
// Of the folder for device plugins, which another node of this machine may use, it
// removes the kubelet's socket if no kubelet listens on it.
func Cleanup(cfg Config) error {
	return errors.Join(
		cgroup.End(cfg.CgroupRoot),
		mounts.DetachBelow(cfg.kubeletDir()),
		cgroup.Remove(cfg.CgroupRoot),
		stalesocket.Remove(pluginapi.KubeletSocket),
	)
}
