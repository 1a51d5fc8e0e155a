// Package namespaces runs functions in other namespaces than the process's, on threads that the Go
// scheduler does not give to other goroutines meanwhile.
//
//   - [Network] is a network namespace: opened, created and entered for a few system calls. The
//     thread is moved back afterwards.
//   - [OnOwnThread] runs a function on a thread that ends with it, for changes that cannot be
//     undone, such as a mount namespace.
//
// It moves no whole process and configures nothing in a namespace. It imports nothing of kedge,
// and any package of kedge may import it.
package namespaces
