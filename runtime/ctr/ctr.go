// Package ctr is containerd's own command line client, wired to a node of kedge: for
// looking at containers when something is wrong. It is apart from package runtime
// because it is the only user of a second command line library, and because being
// linked is not free: upstream's package silences gRPC's log of the whole process
// when it is initialised.
//
// Package main may import it, nothing else.
package ctr

import (
	"context"

	"github.com/containerd/containerd/v2/cmd/ctr/app"
	"github.com/urfave/cli/v3"
)

// Run runs ctr with the arguments that follow its name. Without --address and
// --namespace it looks at what the kubelet of the node at socket sees.
func Run(ctx context.Context, socket string, args []string) error {
	cmd := app.New()
	for _, f := range cmd.Flags {
		flag, ok := f.(*cli.StringFlag)
		if !ok {
			continue
		}
		switch flag.Name {
		case "address":
			flag.Value = socket
		case "namespace":
			flag.Value = "k8s.io"
		}
	}
	return cmd.Run(ctx, append([]string{"ctr"}, args...))
}
