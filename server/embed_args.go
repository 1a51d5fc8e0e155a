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

// APIServerFlags, ControllerFlags and SchedulerFlags are those that the settings of the
// same names may give, for a look at them before anything is done. What is set in them
// has no effect, but for GlobalFlags.
func APIServerFlags() (*pflag.FlagSet, error) {
	return flat(apiserver.NewServerRunOptions().Flags()), nil
}

// ControllerFlags: see APIServerFlags.
func ControllerFlags() (*pflag.FlagSet, error) {
	opts, err := controllers.NewKubeControllerManagerOptions()
	if err != nil {
		return nil, fmt.Errorf("make the controllers' options: %w", err)
	}
	return flat(opts.Flags(app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases())), nil
}

// SchedulerFlags: see APIServerFlags.
func SchedulerFlags() (*pflag.FlagSet, error) {
	return flat(*scheduler.NewOptions().Flags), nil
}

// GlobalFlags are kept by upstream once for all components of a process, whichever of
// them is given it: a value that is set is one for good.
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
