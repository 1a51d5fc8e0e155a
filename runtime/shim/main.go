// Command shim is containerd's runc shim, with upstream's packages as they are: the parent
// of a pod's containers, which lives on when kedge ends.
//
// It has a main of its own because containers inherit from it what they must not have from
// kedge. It is no place for other changes to the shim. scripts/build-payload.sh builds it
// as containerd-shim-runc-v2, and nothing imports it.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	_ "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task/plugin" // the task service itself
	"github.com/containerd/containerd/v2/pkg/shim"

	"kedge/internal/timerslack"
)

func main() {
	// An idle kedge lets the kernel wake it late, and a child is as patient as its parent;
	// a container's sleep must end when it should.
	if err := timerslack.Restore(); err != nil {
		fmt.Fprintln(os.Stderr, "containerd-shim-runc-v2:", err)
		os.Exit(1)
	}
	shim.RunShim(context.Background(), manager.NewShimManager("io.containerd.runc.v2"))
}
