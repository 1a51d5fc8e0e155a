// Package sparethread runs functions that change what belongs to a thread and cannot be
// changed back: its namespaces, above all.
//
// It is not for what can be changed back, as internal/netns does. Any package of kedge may
// import it.
package sparethread

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs fn on a thread that ends with it, and returns its error. Goroutines and
// threads that fn starts are not affected by what it changes; processes are.
//
// That thread is never the process's first: Go cannot end the first thread and parks it,
// in fn's namespaces, and what /proc/self says of a process is what is true of its first
// thread. All who read /proc/self/mountinfo would see the mounts of a moment long past.
func Run(fn func() error) error {
	done := make(chan error)
	var run func(begun chan<- struct{})
	run = func(begun chan<- struct{}) {
		runtime.LockOSThread() // and never unlocked, which ends the thread
		close(begun)
		if unix.Gettid() == unix.Getpid() {
			other := make(chan struct{})
			go run(other)
			<-other // it has another thread, because this one is taken
			runtime.UnlockOSThread()
			return
		}
		err := errors.New("the function did not return")
		defer func() { done <- err }()
		err = fn()
	}
	go run(make(chan struct{}))
	return <-done
}
