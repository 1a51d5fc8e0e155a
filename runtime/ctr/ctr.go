// Package ctr is containerd's own command line client, configured for a node of kedge, for inspecting
// containers when something is wrong. It is separate from package runtime because it is the only user of a
// second command line library, and because linking it has a side effect: upstream's package silences the gRPC
// log of the whole process when it is initialised.
//
// Only package main may import it.
package ctr

import (
	"context"

	"github.com/containerd/containerd/v2/cmd/ctr/app"
	"github.com/urfave/cli/v3"
)

// Run runs ctr with args. The defaults of --address and --namespace are socket and the kubelet's namespace.
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
