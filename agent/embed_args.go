package agent

import (
	"fmt"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
)

// Flags are those that --kubelet-arg may name, for a look at them before anything is
// done: what is set in them has no effect.
func Flags() (*pflag.FlagSet, error) {
	server, err := options.NewKubeletServer()
	if err != nil {
		return nil, fmt.Errorf("make the kubelet's options: %w", err)
	}
	fs := pflag.NewFlagSet("kubelet", pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	server.AddFlags(fs)
	return fs, nil
}
