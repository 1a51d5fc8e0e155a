package runtime

// This file imports the plugins of containerd that kedge runs: containerd registers a plugin when its package
// is imported. Deliberately left out are snapshotters that need devices or tools (btrfs, zfs, devmapper,
// blockfile, erofs), NRI, the restart monitor (the kubelet restarts containers), image verifiers, the metrics
// and debug servers, cgroup metrics (the kubelet collects them), tracing, and "opt", which would install
// programs under /opt.
import (
	"io"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	// Registers the options type of the runc runtime, so that options can be decoded.
	_ "github.com/containerd/containerd/api/types/runc/options"

	// Storage: blobs, layers, the database that names them, and its collector.
	_ "github.com/containerd/containerd/v2/plugins/content/local/plugin"
	_ "github.com/containerd/containerd/v2/plugins/diff/walking/plugin"
	_ "github.com/containerd/containerd/v2/plugins/gc"
	_ "github.com/containerd/containerd/v2/plugins/leases"
	_ "github.com/containerd/containerd/v2/plugins/metadata"
	_ "github.com/containerd/containerd/v2/plugins/mount"
	_ "github.com/containerd/containerd/v2/plugins/snapshots/native/plugin"
	_ "github.com/containerd/containerd/v2/plugins/snapshots/overlay/plugin"

	// Running: shims, tasks, sandboxes, events.
	_ "github.com/containerd/containerd/v2/core/runtime/v2"
	_ "github.com/containerd/containerd/v2/plugins/events"
	_ "github.com/containerd/containerd/v2/plugins/sandbox"
	_ "github.com/containerd/containerd/v2/plugins/streaming"
	_ "github.com/containerd/containerd/v2/plugins/transfer"

	// Services on the socket; the CRI uses most of them in memory.
	_ "github.com/containerd/containerd/v2/plugins/server/grpc"
	_ "github.com/containerd/containerd/v2/plugins/server/ttrpc"
	_ "github.com/containerd/containerd/v2/plugins/services/containers"
	_ "github.com/containerd/containerd/v2/plugins/services/content"
	_ "github.com/containerd/containerd/v2/plugins/services/diff"
	_ "github.com/containerd/containerd/v2/plugins/services/events"
	_ "github.com/containerd/containerd/v2/plugins/services/healthcheck"
	_ "github.com/containerd/containerd/v2/plugins/services/images"
	_ "github.com/containerd/containerd/v2/plugins/services/introspection"
	_ "github.com/containerd/containerd/v2/plugins/services/leases"
	_ "github.com/containerd/containerd/v2/plugins/services/mounts"
	_ "github.com/containerd/containerd/v2/plugins/services/namespaces"
	_ "github.com/containerd/containerd/v2/plugins/services/sandbox"
	_ "github.com/containerd/containerd/v2/plugins/services/snapshots"
	_ "github.com/containerd/containerd/v2/plugins/services/streaming"
	_ "github.com/containerd/containerd/v2/plugins/services/tasks"
	_ "github.com/containerd/containerd/v2/plugins/services/transfer"
	_ "github.com/containerd/containerd/v2/plugins/services/version"
	_ "github.com/containerd/containerd/v2/plugins/services/warning"

	// The CRI itself.
	_ "github.com/containerd/containerd/v2/plugins/cri"
	_ "github.com/containerd/containerd/v2/plugins/cri/images"
	_ "github.com/containerd/containerd/v2/plugins/cri/runtime"
)

// pluginSet holds containerd's plugin instances. containerd's constructor does not return them when it fails
// halfway, with databases open for which the next attempt would wait. It is global, like containerd's plugin
// registry.
var pluginSet struct {
	sync.Mutex

	registered bool
	plugins    *plugin.Set
}

// registerPluginSet registers a plugin that stores containerd's plugin set in pluginSet.
func registerPluginSet() {
	pluginSet.Lock()
	defer pluginSet.Unlock()
	if pluginSet.registered {
		return
	}
	pluginSet.registered = true
	registry.Register(&plugin.Registration{
		Type: plugins.InternalPlugin,
		ID:   "kedge-composed",
		InitFn: func(ic *plugin.InitContext) (any, error) {
			pluginSet.Lock()
			defer pluginSet.Unlock()
			pluginSet.plugins = ic.Plugins()
			return nil, plugin.ErrSkipPlugin
		},
	})
}

// closePlugins closes the plugins of a containerd whose constructor failed.
func closePlugins() {
	pluginSet.Lock()
	defer pluginSet.Unlock()
	if pluginSet.plugins == nil {
		return
	}
	for _, p := range slices.Backward(pluginSet.plugins.GetAll()) {
		if instance, err := p.Instance(); err == nil {
			if c, ok := instance.(io.Closer); ok {
				_ = c.Close() // the caller reports the failure of the constructor
			}
		}
	}
	pluginSet.plugins = nil
}
