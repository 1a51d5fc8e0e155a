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

// csiNode is a variable of upstream's CSI plugin: the node as which plugins are
// registered. There is no exported way to set it; TestVolumesMatchUpstream of
// internal/house fails when it changes.
//
//go:linkname csiNode k8s.io/kubernetes/pkg/volume/csi.nim
var csiNode nodeinfomanager.Interface

// Volumes keeps apart the two that use upstream's volume plugins in one process: the
// kubelet, and the controllers, which are built every time that this server begins to
// lead.
//
// The CSI plugin keeps its node and the handler of registrations in variables of its
// package, since upstream expects a process to be one or the other. Whoever is
// initialised last owns them: were it the controllers, which have no node, the kubelet
// would ask for a CSINode without a name for ever. So the kubelet comes after the
// controllers where they are built at the start, and otherwise gets back what was its.
type Volumes struct {
	leads lifecycle.Condition // whether the controllers are about to be built

	mu       sync.Mutex
	kubelet  bool          // its plugins are initialised, or about to be
	building chan struct{} // closed when the controllers are built; nil while none are
	built    bool          // once at least
}

// NewVolumes makes one for a process whose controllers are built when leads holds.
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
	// It went first, and has nearly done so: there is nothing between its prober
	// and the plugin but a loop.
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
		poll := time.After(10 * time.Millisecond) // until they begin to be built
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

// afterControllers lets the kubelet's volume plugins be initialised when volumes
// allows. The prober is the first thing that the plugins' initialisation calls.
type afterControllers struct {
	volume.DynamicPluginProber

	ctx     context.Context
	volumes *Volumes // nil where this process has no controllers
}

func (p afterControllers) Init() error {
	if p.volumes != nil {
		p.volumes.await(p.ctx)
	}
	return p.DynamicPluginProber.Init()
}
