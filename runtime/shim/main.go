// Command shim is containerd's runc shim, built from upstream's packages: the parent of a pod's containers,
// which continues to run when kedge ends.
//
// It is a program of its own because containers inherit properties of their parent that they must not have from
// kedge, and because one of its answers must differ from upstream's: see ended. Other changes to the shim do
// not belong here. scripts/build-payload.sh builds it as containerd-shim-runc-v2, and no package imports it.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task/plugin" // the task service itself
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"kedge/internal/footprint"
)

func main() {
	// An idle kedge has a large timer slack, which its children inherit; the timers of a container must be
	// exact.
	if err := footprint.RestoreTimerSlack(); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-shim-runc-v2:", err)
		os.Exit(1)
	}
	registry.Register(&plugin.Registration{
		Type:   plugins.InternalPlugin,
		ID:     "kedge-ended",
		InitFn: func(*plugin.InitContext) (any, error) { return &ended{held: map[string][]io.Closer{}}, nil },
	})
	shim.RunShim(context.Background(), manager.NewShimManager("io.containerd.runc.v2"))
}
