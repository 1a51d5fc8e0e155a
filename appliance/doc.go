// Package appliance is the installation of kedge on a machine: "kedge install", "kedge upgrade" and "kedge uninstall".
//
// An installation is a plan that is executed. [Machine.Plan] reads the machine and compares it with what is wanted; the
// result is a list of steps, which the command can show ("--dry-run") or execute ([Machine.Apply]). The functions that
// make plans read and write nothing. Every step is recorded in a journal in the data directory before it is executed
// ([Journal]), so that an installation that was interrupted at any instant is completed by the next one, and
// "kedge uninstall" removes only what kedge has made and nobody has changed.
//
// The journal's life of a file: no entry -> entry with the hash that will be written (next) -> entry with the hash that
// was written. A file that has neither hash belongs to somebody else.
//
// An upgrade is staged ([Machine.Stage]): the new executable is checked, and checks the machine, before the node is
// touched. It is then on trial: package bootguard decides at each start which executable runs, and a process of its own
// ([Machine.Watch]) watches the node, gives the verdict and carries it out. The command only follows ([Begun]), so that an
// upgrade goes on without it.
//
// The package starts executables of kedge, and two programs of the host: systemctl on machines with systemd, and rc-service
// with rc-update on machines with OpenRC, because a service manager has no other stable interface. They are behind
// [Manager]. Everything else is done by system calls, by requests to the node's API, and, for releases, by HTTPS.
//
// The package knows no setting of kedge and no component: the command gives it the settings to write, the check of the
// machine and the function that kills containers. Only package command may import it. The waiting for a node uses the
// report of the running process (package control).
package appliance
