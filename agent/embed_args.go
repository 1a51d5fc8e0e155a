package agent

import (
	"fmt"
	"slices"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kubernetes/cmd/kubelet/app/options"

	"kedge/internal/componentflags"
)

// Flags returns the flags that --kubelet-arg may contain, for checking arguments before anything starts. Values
// set in them have no effect.
func Flags() (*pflag.FlagSet, error) {
	server, err := options.NewKubeletServer()
	if err != nil {
		return nil, fmt.Errorf("create the kubelet's options: %w", err)
	}
	fs := pflag.NewFlagSet("kubelet", pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	server.AddFlags(fs)
	return fs, nil
}

// CheckFiles reads the configuration files that cfg.KubeletArgs name, and reports what is wrong with them. Other flags
// are left out: upstream prints for some of them, whenever they are parsed, that they are deprecated.
func CheckFiles(cfg Config) error {
	cfg.KubeletArgs = slices.DeleteFunc(slices.Clone(cfg.KubeletArgs), func(arg string) bool {
		name, _, _ := componentflags.Split(arg)
		return name != "config" && name != "config-dir"
	})
	if len(cfg.KubeletArgs) == 0 {
		return nil
	}
	kc, err := options.NewKubeletConfiguration()
	if err != nil {
		return fmt.Errorf("make the kubelet's configuration: %w", err)
	}
	k := &Kubelet{cfg: cfg, server: &options.KubeletServer{KubeletFlags: *options.NewKubeletFlags(), KubeletConfiguration: *kc}}
	return k.configure()
}
