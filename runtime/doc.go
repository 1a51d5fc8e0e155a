// Package runtime runs the containers of a node: containerd inside the kedge process, the runc shim and runc
// beside it, the images imported from archives, and the registries from which images are pulled.
//
// It has two components for internal/lifecycle: Runtime (containerd itself, with the pause image) and Images
// (the archives in the images folder, imported once and pinned), which starts after Runtime. The functions for
// the command line (ImportImages and the like, StopAllPods, KillAll) need no component.
//
// It is not a container runtime of its own: upstream's CRI plugin, shim and runc create the pods, all at the
// versions in go.mod. It uses no part of Kubernetes except the CRI and no part of the pod network except the
// two CNI folders in Config, and it never calls an API server.
//
// Containers outlive the process. Stopping Runtime leaves every pod running; the next start finds the shims by
// their sockets. Only StopAllPods and KillAll end pods.
//
// The packages agent, assembly and main may import it; server, datastore, network and dns must not. Its name
// shadows the standard library's runtime: a file that needs both imports the standard package as goruntime. See
// DESIGN.md in this folder.
package runtime
