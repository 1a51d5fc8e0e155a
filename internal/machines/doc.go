// Package machines makes whole machines on one: each has its own processes, mounts,
// host name, control group, disk and network, joined to the others of its site by a
// switch, and runs a kedge that finds everything where it is on a machine of its own.
//
//	site, on disk          in the kernel, while it runs
//	DIR/site.json          /sys/fs/cgroup/.../kedge-machines-ID
//	DIR/switch             .../switch      keeper of the switch and of published ports
//	DIR/NAME/root          .../NAME/init   keeper of the machine, kedge
//	                       .../NAME/...    containers
//	                       link kdm-ID     when the host reaches the machines
//
// A machine lives as long as its keeper (package keeper), the first process in its
// namespaces: when it ends, in whatever way, the kernel ends the others and takes
// mounts and network away. What remains is recorded in site.json before it is made,
// so that [Remove] finds it after any crash; processes are found by their control
// group, never by name. On the host nothing is mounted, and no namespace is bound
// to a path.
//
// The disk of a machine is a folder. It has the host's programs read-only, and no
// way to the rest of the host's files. A reboot ends every process, forgets mounts
// and network and empties /run and /tmp; wiping empties the disk too.
//
// It is not for what runs on the machines: callers say with which arguments kedge is
// started. Package main ("kedge up") and tests may import it. Everything needs root.
package machines
