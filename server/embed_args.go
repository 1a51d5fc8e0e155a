package server

import (
	"fmt"

	"github.com/spf13/pflag"
	cliflag "k8s.io/component-base/cli/flag"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app/options"
)

// APIServerFlags, ControllerFlags and SchedulerFlags return the flags that the settings of the same names may
// contain, for checking arguments before anything starts. Values set in them have no effect, except those of
// GlobalFlags.
func APIServerFlags() (*pflag.FlagSet, error) {
	return flat(apiserver.NewServerRunOptions().Flags()), nil
}

// ControllerFlags is described at APIServerFlags.
func ControllerFlags() (*pflag.FlagSet, error) {
	opts, err := controllers.NewKubeControllerManagerOptions()
	if err != nil {
		return nil, fmt.Errorf("create the controllers' options: %w", err)
	}
	return flat(opts.Flags(app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases())), nil
}

// SchedulerFlags is described at APIServerFlags.
func SchedulerFlags() (*pflag.FlagSet, error) {
	return flat(*scheduler.NewOptions().Flags), nil
}

// GlobalFlags are flags whose values upstream stores once per process, for all components: setting one is
// permanent.
func GlobalFlags() []string {
	return []string{"feature-gates", "emulated-version", "min-compatibility-version"}
}

func flat(named cliflag.NamedFlagSets) *pflag.FlagSet {
	fs := pflag.NewFlagSet("", pflag.ContinueOnError)
	for _, f := range named.FlagSets {
		fs.AddFlagSet(f)
	}
	return fs
}
