// Package supervisor is the first process (PID 1) of a machine of package machine, and the
// process that holds a site's switch.
//
// A machine's supervisor joins the machine's control group, makes its mounts, runs kedge on
// request, and reaps orphans. When it ends, the kernel ends every other process of the machine
// and removes its mounts and, with the last process, its network: only files and empty control
// groups outlive the supervisor.
//
// The supervisor is the kedge executable under another name (see [Main]), and must stay small
// in code and memory: the package imports nothing of kedge. Only the launcher, package main
// and package machine import it.
package supervisor

import (
	"fmt"
	"os"
)

// Names by which the executable is called to become a process of this package. Running
// machines of older versions use them too.
const (
	MachineName = "kedge-machine"
	EnterName   = "kedge-machine-enter"
	SwitchName  = "kedge-machine-switch"
)

// Paths inside a machine.
const (
	ProgramPath    = "/opt/kedge/kedge" // the executable under test or in use
	SupervisorPath = "/opt/kedge/keeper"
	Socket         = "/run/kedge-machine.sock" // of the supervisor, for requests
	LogPath        = "/var/log/kedge.log"      // output of kedge
)

// Leaf is the control group of the machine's own processes, below the machine's control group,
// which is the root inside the machine.
const Leaf = "init"

// File descriptors that a supervisor inherits from the tool that starts it.
const (
	specFile  = 3 // the specification, then a byte that means go, then nothing until the tool ends
	readyFile = 4 // for the result of the setup
	NetFile   = 5 // the switch's namespace, for its supervisor
	portFiles = 6 // the first of its listeners
)

// Machine is the specification of a machine.
type Machine struct {
	Root       string   `json:"root"` // folder that is the machine's disk
	Hostname   string   `json:"hostname"`
	Cgroups    []string `json:"cgroups"`  // folders of the machine's control group, one a hierarchy
	Program    string   `json:"program"`  // executable to be found at ProgramPath
	Supervisor string   `json:"keeper"`   // executable to be found at SupervisorPath
	Tethered   bool     `json:"tethered"` // the machine ends with the tool that made it
}

// Switch is the specification of the supervisor of a switch.
type Switch struct {
	Cgroups  []string `json:"cgroups"`
	Tethered bool     `json:"tethered"`
	// Targets is the file with the addresses of the machines, one a line. A connection to a
	// port is passed to the first machine that answers.
	Targets string `json:"targets,omitempty"`
	Ports   []int  `json:"ports,omitempty"` // of the targets, in the order of the listeners
}

// Main runs the process of this package whose name is args[0], and reports whether there is
// such a process; code is then its exit code.
func Main(args []string) (code int, was bool) {
	if len(args) == 0 {
		return 0, false
	}
	var err error
	switch args[0] {
	case MachineName:
		err = superviseMachine(args)
	case SwitchName:
		err = superviseSwitch()
	case EnterName:
		err = enter(args[1:])
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kedge:", err)
		return 125, true
	}
	return 0, true
}
