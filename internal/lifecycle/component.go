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

	// Run works until ctx is cancelled, cleans up after itself, and returns.
	// It calls ready once, when a dependent's first call can succeed; further
	// calls, and calls after Run has returned, have no effect.
	// Returning before ctx is cancelled, with or without an error, is a failure. So is an
	// error after that, unless it is context.Canceled or Run had not called ready yet: its
	// start was cut off, which is what the error is about.
	Run(ctx context.Context, ready func()) error
}

// Checker is implemented by components that can say whether they are still
// healthy after they became ready. Check must return promptly once ctx ends.
type Checker interface {
	Check(ctx context.Context) error
}

// Describer is implemented by components of which there is something to say that is
// no problem, in a few words. It must return at once.
type Describer interface {
	Describe() string
}

// StopTimeouter is implemented by components that need another time to stop
// than the group's default.
type StopTimeouter interface {
	StopTimeout() time.Duration
}

// State is where a component stands in its life; the package comment draws how
// the states follow each other.
type State string

// The states of a component.
const (
	Waiting  State = "waiting"  // for the components it comes after
	Starting State = "starting" // Run was called, ready was not
	Ready    State = "ready"    // ready was called
	Stopping State = "stopping" // its context is cancelled, Run has not returned
	Stopped  State = "stopped"  // Run has returned because it was asked to
	Failed   State = "failed"   // Run returned unasked, panicked, or did not stop in time
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
