// Package runtime runs the containers of a node: containerd inside our process,
// the runc shim and runc beside it, the images that were carried in as files,
// and the registries that images are pulled from.
//
// It has two components for internal/lifecycle: Runtime (containerd itself, the
// pause image included) and Images (the archives in the images folder, imported
// once and pinned), which comes after Runtime. The functions for the command
// line (ImportCommand and its sisters, StopAllPods, KillAll) need no component.
//
// It is not a container runtime of its own: pods are made by upstream's CRI
// plugin, by the shim and by runc, all at the versions in go.mod. It knows
// nothing of Kubernetes beyond the CRI, nothing of the pod network beyond the two
// CNI folders it is told, and never talks to an API server.
//
// Containers outlive the process. Stopping Runtime leaves every pod running; the
// next start finds the shims again by their sockets. Only StopAllPods and KillAll
// end pods.
//
// Packages agent and main may import it; server, datastore, network and dns must
// not. Its name shadows the standard library's: a file that needs both imports the
// standard one as goruntime. See DESIGN.md beside this file.
package runtime
