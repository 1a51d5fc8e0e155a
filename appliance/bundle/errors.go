package bundle

import (
	"errors"
	"fmt"
)

// ErrNone is returned by [Open] for a file that can be an executable and has no bundle.
var ErrNone = errors.New("the file has no bundle")

// DamagedError is a bundle with another content than it was made with.
type DamagedError struct{ Path, Reason string }

func (e *DamagedError) Error() string {
	return fmt.Sprintf("the bundle %s is damaged: %s; copy it again", e.Path, e.Reason)
}

// NewerError is a bundle in a format that this kedge does not know.
type NewerError struct {
	Path   string
	Format int
}

func (e *NewerError) Error() string {
	return fmt.Sprintf("the bundle %s has format %d, which this kedge does not know; use a newer kedge", e.Path, e.Format)
}

// TrustError is a bundle that is not signed as the machine demands.
type TrustError struct{ Path, Reason string }

func (e *TrustError) Error() string {
	return fmt.Sprintf("the bundle %s is not to be trusted: %s", e.Path, e.Reason)
}

// BaseError is a bundle made by "kedge bundle diff" on a machine that lacks what it was made for.
type BaseError struct{ Path, Lacks string }

func (e *BaseError) Error() string {
	return fmt.Sprintf("the bundle %s has only what is new, and this machine lacks %s of the bundle before it; install that first, or use the whole bundle", e.Path, e.Lacks)
}

// ArchitectureError is a bundle without an executable for this machine.
type ArchitectureError struct {
	Path, Want string
	Has        []string
}

func (e *ArchitectureError) Error() string {
	return fmt.Sprintf("the bundle %s is for %s, and this machine is %s; use the bundle for this architecture", e.Path, list(e.Has), e.Want)
}

// SpaceError is a disk without the space for the contents of a bundle.
type SpaceError struct {
	Dir         string
	Needs, Free int64 // bytes
}

func (e *SpaceError) Error() string {
	return fmt.Sprintf("the file system of %s has %d MiB free, and the bundle needs %d MiB there; free some space, or use a larger disk", e.Dir, e.Free>>20, e.Needs>>20+1)
}
