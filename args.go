package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"kedge/agent"
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
	err := argErrors("--kubelet-arg", s.agent.KubeletArgs, agent.Flags, nil)
	if err == nil { // the kubelet's flags may name files, which it reads when it is made
		_, err = agent.NewKubelet(s.agent, slog.New(slog.DiscardHandler))
	}
	return errors.Join(append(errs, err)...)
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
		name, value, valued := strings.Cut(strings.TrimLeft(arg, "-"), "=")
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
