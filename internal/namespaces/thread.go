package namespaces

import (
	"errors"
	"runtime"

	"golang.org/x/sys/unix"
)

// OnOwnThread runs fn on a thread that ends with fn, and returns fn's error. It is for changes of a thread that cannot
// be undone: above all of its namespaces. Goroutines and threads
// that fn starts are not affected by its changes; processes that it starts are.
//
// The thread is never the process's first: Go cannot end the first thread and parks it, in
// fn's namespaces, and /proc/self shows the state of the first thread. Readers of
// /proc/self/mountinfo would see outdated mounts.
func OnOwnThread(fn func() error) error {
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
