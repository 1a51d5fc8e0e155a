package assembly

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"kedge/agent"
	"kedge/internal/componentflags"
	"kedge/internal/errorkind"
	"kedge/server"
	"kedge/settings"
)

// checkArgs reports arguments for upstream components that these would refuse. The components report them too
// when they are created, but by then a token may have been used.
func (s *Config) checkArgs() error {
	var errs []error
	if s.parts.ControlPlane {
		errs = append(errs,
			argErrors(settings.APIServerArgs.Name, s.server.APIServerArgs, server.APIServerFlags, server.GlobalFlags()),
			argErrors(settings.ControllerArgs.Name, s.server.ControllerArgs, server.ControllerFlags, server.GlobalFlags()),
			argErrors(settings.SchedulerArgs.Name, s.server.SchedulerArgs, server.SchedulerFlags, server.GlobalFlags()))
	}
	if !s.parts.Node || len(s.agent.KubeletArgs) == 0 {
		return errors.Join(errs...)
	}
	errs = append(errs, argErrors(settings.KubeletArgs.Name, s.agent.KubeletArgs, agent.Flags, nil))
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return agent.CheckFiles(s.agent)
}

// argErrors reports the errors in args, which the user has given to a component with kedge's setting from.
// known returns the component's flags. Flags in global are only checked for existence.
func argErrors(from string, args []string, known func() (*pflag.FlagSet, error), global []string) error {
	if len(args) == 0 {
		return nil // building the flag set of a component is expensive
	}
	flags, err := known()
	if err != nil {
		return err
	}
	var names []string
	flags.VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	var errs []error
	for _, arg := range args {
		name, value, valued := componentflags.Split(arg)
		switch f := flags.Lookup(name); {
		case name == "":
			err = errors.New("want NAME=VALUE")
		case f == nil:
			err = fmt.Errorf("%s has no such flag%s", strings.TrimSuffix(from, "-arg"), settings.DidYouMean(name, names))
		case !valued && f.NoOptDefVal == "":
			err = errors.New("want NAME=VALUE")
		case !valued || slices.Contains(global, f.Name):
			err = nil
		default:
			if err = f.Value.Set(value); err != nil {
				err = fmt.Errorf("%s wants a value of type %s: %w", name, f.Value.Type(), err)
			}
		}
		if err != nil {
			errs = append(errs, errorkind.BadItem(from, arg, " %q: %w", arg, err))
		}
	}
	return errors.Join(errs...)
}
