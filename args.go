package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"kedge/agent"
	"kedge/internal/componentflags"
	"kedge/internal/config"
	"kedge/server"
)

// checkArgs reports what the upstream components will not take of the flags that the user
// gives them. They say so themselves when they are made, but by then a token may be spent.
func (s *settings) checkArgs() error {
	var errs []error
	if !s.agentOnly {
		errs = append(errs,
			argErrors("--kube-apiserver-arg", s.server.APIServerArgs, server.APIServerFlags, server.GlobalFlags()),
			argErrors("--kube-controller-manager-arg", s.server.ControllerArgs, server.ControllerFlags, server.GlobalFlags()),
			argErrors("--kube-scheduler-arg", s.server.SchedulerArgs, server.SchedulerFlags, server.GlobalFlags()))
	}
	if s.disableAgent || len(s.agent.KubeletArgs) == 0 {
		return errors.Join(errs...)
	}
	errs = append(errs, argErrors("--kubelet-arg", s.agent.KubeletArgs, agent.Flags, nil))
	// These name files, which the kubelet reads when it is made. Of others it would print
	// here, and once more when it is made, that they are deprecated.
	files := s.agent
	files.KubeletArgs = slices.DeleteFunc(slices.Clone(files.KubeletArgs), func(arg string) bool {
		name, _, _ := componentflags.Split(arg)
		return name != "config" && name != "config-dir"
	})
	if err := errors.Join(errs...); err != nil || len(files.KubeletArgs) == 0 {
		return err
	}
	_, err := agent.NewKubelet(files, slog.New(slog.DiscardHandler))
	return err
}

// argErrors are what is wrong with args, which the user has given to a component with
// kedge's flag from. Flags among global are only looked for.
func argErrors(from string, args []string, known func() (*pflag.FlagSet, error), global []string) error {
	if len(args) == 0 {
		return nil // the flags of a component are many
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
			err = fmt.Errorf("%s has no flag of this name%s", strings.TrimSuffix(strings.TrimLeft(from, "-"), "-arg"), config.DidYouMean(name, names))
		case !valued && f.NoOptDefVal == "":
			err = errors.New("want NAME=VALUE")
		case !valued || slices.Contains(global, f.Name):
			err = nil
		default:
			if err = f.Value.Set(value); err != nil {
				err = fmt.Errorf("%s takes %s: %w", name, f.Value.Type(), err)
			}
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %q: %w", from, arg, err))
		}
	}
	return errors.Join(errs...)
}
