package agent

import (
	"context"
	"sync"
	"time"
	_ "unsafe" // for go:linkname

	"k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/csi"
	"k8s.io/kubernetes/pkg/volume/csi/nodeinfomanager"

	"kedge/internal/lifecycle"
)

// csiNode is a variable of upstream's CSI plugin: the node for which plugins are registered. It cannot be set
// through an exported function; TestVolumesMatchUpstream of scripts/house fails when it changes.
//
//go:linkname csiNode k8s.io/kubernetes/pkg/volume/csi.nim
var csiNode nodeinfomanager.Interface

// Volumes separates the two users of upstream's volume plugins in one process: the kubelet, and the
// controllers, which are built each time this server becomes the leader.
//
// The CSI plugin keeps its node and the handler of registrations in package variables, because upstream expects
// a process to be either the kubelet or the controllers. The last initialisation wins: after that of the
// controllers, which have no node, the kubelet would request a CSINode without a name for ever. So the
// kubelet's plugins are initialised after the controllers' if those are built at the start, and otherwise Build
// restores the variables.
type Volumes struct {
	leads lifecycle.Condition // true if the controllers are about to be built

	mu       sync.Mutex
	kubelet  bool          // the kubelet's plugins are initialised, or about to be
	building chan struct{} // closed when the controllers are built; nil while they are not being built
	built    bool          // the controllers were built at least once
}

// NewVolumes returns the Volumes of a process that builds its controllers when leads holds.
func NewVolumes(leads lifecycle.Condition) *Volumes { return &Volumes{leads: leads} }

// Build calls build, which initialises the controllers' volume plugins.
func (v *Volumes) Build(ctx context.Context, build func() error) error {
	v.mu.Lock()
	kubelet, done := v.kubelet, make(chan struct{})
	v.building = done
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		v.building, v.built = nil, true
		v.mu.Unlock()
		close(done)
	}()
	if !kubelet {
		return build()
	}
	// The kubelet was first and is almost finished: between its prober and the CSI plugin there is only a loop.
	for csiNode == nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	node, handler := csiNode, *csi.PluginHandler
	defer func() { csiNode, *csi.PluginHandler = node, handler }()
	return build()
}

// await returns when the kubelet's plugins may be initialised, or ctx has ended.
func (v *Volumes) await(ctx context.Context) {
	for ctx.Err() == nil {
		leads, changed := v.leads.Holds()
		v.mu.Lock()
		building := v.building
		if building == nil && (v.built || !leads) {
			v.kubelet = true
			v.mu.Unlock()
			return
		}
		v.mu.Unlock()
		poll := time.After(10 * time.Millisecond) // until building begins
		if building != nil {
			poll = nil
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-building:
		case <-poll:
		}
	}
}

// afterControllers delays the initialisation of the kubelet's volume plugins until volumes allows it. The
// prober is called first during that initialisation.
type afterControllers struct {
	volume.DynamicPluginProber

	ctx     context.Context
	volumes *Volumes // nil if this process has no controllers
}

func (p afterControllers) Init() error {
	if p.volumes != nil {
		p.volumes.await(p.ctx)
	}
	return p.DynamicPluginProber.Init()
}
