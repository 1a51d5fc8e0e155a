package lifecycle

import (
	"context"
	"time"
)

// Component is one long-running part of the appliance.
type Component interface {
	// Name is unique in its group, stable and lower-case: it appears in logs,
	// in `kedge status` and in metrics.
	Name() string

	// Run works until ctx is cancelled, cleans up after itself, and returns. It calls ready
	// once, when the first call of a dependent can succeed; further calls, and calls after
	// Run has returned, have no effect.
	// A return before ctx is cancelled, with or without an error, is a failure. Its
	// consequences depend on how the component was added to its group. An error after ctx
	// is cancelled is a failure too, unless it is context.Canceled, or Run had not called
	// ready yet: then the stop interrupted its start, which the error is about.
	Run(ctx context.Context, ready func()) error
}

// Checker is implemented by components that can say whether they are still
// healthy after they became ready. Check must return promptly once ctx ends.
type Checker interface {
	Check(ctx context.Context) error
}

// Describer is implemented by components that have something to report besides problems, in a
// few words. Describe must return at once.
type Describer interface {
	Describe() string
}

// StopTimeouter is implemented by components that need another stop timeout than the group's
// default.
type StopTimeouter interface {
	StopTimeout() time.Duration
}

// State is the state of a component. The package comment has the transitions.
type State string

// The states of a component.
const (
	Waiting  State = "waiting"  // for its dependencies
	Starting State = "starting" // Run was called, ready was not
	Ready    State = "ready"    // ready was called
	Stopping State = "stopping" // its context is cancelled, Run has not returned
	Stopped  State = "stopped"  // Run has returned on request
	Failed   State = "failed"   // Run returned without a request, panicked, or did not stop in time

	Restarting State = "restarting" // Run has failed, and is called again after a pause
)

// Func makes a component of a name and a function.
func Func(name string, run func(ctx context.Context, ready func()) error) Component {
	return funcComponent{name: name, run: run}
}

type funcComponent struct {
	name string
	run  func(ctx context.Context, ready func()) error
}

func (f funcComponent) Name() string { return f.name }

func (f funcComponent) Run(ctx context.Context, ready func()) error { return f.run(ctx, ready) }
