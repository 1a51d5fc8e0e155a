// Package machine simulates machines on this machine. Each has processes, mounts, a host
// name, a control group, a disk and a network of its own, is joined to the other machines of
// its site by a switch, and runs a kedge that needs no special settings.
//
//	site, on disk          in the kernel, while it runs
//	DIR/site.json          /sys/fs/cgroup/.../kedge-machines-ID
//	DIR/switch             .../switch      supervisor of the switch and of published ports
//	DIR/NAME/root          .../NAME/init   supervisor of the machine, kedge
//	                       .../NAME/...    containers
//	                       link kdm-ID     when the host reaches the machines
//
// A machine lives as long as its supervisor (package supervisor), the first process in its
// namespaces: when the supervisor ends, in whatever way, the kernel ends the other processes
// and removes mounts and network. Files and control groups remain. They are recorded in
// site.json before they are made, so that [Remove] finds them after any crash; processes are
// found by their control group, never by name. Nothing is mounted on the host, and no
// namespace is bound to a path.
//
// The disk of a machine is a folder. The machine sees the host's programs read-only, and none
// of the host's other files. A reboot ends every process, drops mounts and network, and
// empties /run and /tmp; wiping empties the disk too.
//
// The package knows nothing of the programs on the machines: callers give kedge's arguments.
// Packages throwaway and main, and tests, may import it. Everything needs root.
package machine
