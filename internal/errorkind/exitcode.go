package errorkind

import "errors"

// The exit codes. A command that runs another program, such as kubectl, has that program's.
const (
	ExitFailure = 1 // may pass by itself: a service manager should start kedge again
	ExitUsage   = 2 // the command line is wrong
	// ExitConfig is for a mistake in a file or in the environment, and for whatever else stays
	// wrong until somebody changes it: EX_CONFIG of sysexits.h.
	ExitConfig = 78
)

type coded struct {
	error
	code int
}

func (c coded) Unwrap() error { return c.error }

// Permanent marks an error that starting kedge again will not mend. nil stays nil.
func Permanent(err error) error { return mark(err, ExitConfig) }

// BadUsage marks a mistake in the command line. nil stays nil.
func BadUsage(err error) error { return mark(err, ExitUsage) }

func mark(err error, code int) error {
	if err == nil {
		return nil
	}
	return coded{err, code}
}

// Unmark returns the error without the mark on its outside, if it has one.
func Unmark(err error) error {
	if c, ok := err.(coded); ok {
		return c.error
	}
	return err
}

// ExitCode is the exit code for an error: the mark nearest to the outside counts.
func ExitCode(err error) int {
	var c coded
	switch {
	case err == nil:
		return 0
	case errors.As(err, &c):
		return c.code
	}
	return ExitFailure
}
