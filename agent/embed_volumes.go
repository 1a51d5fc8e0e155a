package agent

import (
	"context"

	"k8s.io/kubernetes/pkg/volume"
)

// afterControllers lets the kubelet's volume plugins be initialised only after
// those of the controllers in the same process.
//
// Upstream's CSI plugin keeps its node (nodeinfomanager, the registration handler)
// in variables of the package, since it expects a process to be one or the other.
// Whoever is initialised last owns them: were it the controllers, which have no
// node, the kubelet would ask for a CSINode without a name for ever. The prober is
// the first thing that the plugins' initialisation calls.
type afterControllers struct {
	volume.DynamicPluginProber

	ctx         context.Context
	controllers <-chan struct{} // closed when they are built; nil where there are none
}

func (p afterControllers) Init() error {
	if p.controllers != nil {
		select {
		case <-p.controllers:
		case <-p.ctx.Done():
		}
	}
	return p.DynamicPluginProber.Init()
}
