// Package keeper is the small process that keeps a machine of package machines, and
// the one that keeps its switch.
//
// A machine's keeper is the first process in its namespaces. It joins the machine's
// control group, mounts what a machine has mounted, runs kedge when it is told to,
// and buries orphans. When it ends, the kernel ends every other process of the
// machine and takes away its mounts and, with the last of them, its network: nothing
// of a machine outlives its keeper but files and empty control groups.
//
// The keeper is the executable under another name, as [Main] says, and has to stay
// small in code and memory: this package imports nothing of the house. Only the
// launcher, package main and package machines import it.
package keeper

import (
	"fmt"
	"os"
)

// Names by which the executable is called when it is to be something of this package.
const (
	MachineName = "kedge-machine"
	EnterName   = "kedge-machine-enter"
	SwitchName  = "kedge-machine-switch"
)

// Paths inside a machine.
const (
	ProgramPath = "/opt/kedge/kedge" // the executable under test or in use
	KeeperPath  = "/opt/kedge/keeper"
	Socket      = "/run/kedge-machine.sock" // where the keeper is asked
	LogPath     = "/var/log/kedge.log"      // what kedge writes
)

// Leaf is the control group of the machine's own processes, below the machine's,
// which is the root of what the machine sees.
const Leaf = "init"

// Files that the tool hands to a keeper.
const (
	specFile  = 3 // the specification, then a byte that says go, then nothing until the tool ends
	readyFile = 4 // where the keeper says how it went
	NetFile   = 5 // the switch's namespace, for its keeper
	portFiles = 6 // the first of its listeners
)

// Machine says what a keeper makes.
type Machine struct {
	Root     string   `json:"root"` // folder that is the machine's disk
	Hostname string   `json:"hostname"`
	Cgroups  []string `json:"cgroups"`  // folders of the machine's control group, one a hierarchy
	Program  string   `json:"program"`  // executable to be found at ProgramPath
	Keeper   string   `json:"keeper"`   // executable to be found at KeeperPath
	Tethered bool     `json:"tethered"` // the machine ends with the tool that made it
}

// Switch says what the keeper of a switch does.
type Switch struct {
	Cgroups  []string `json:"cgroups"`
	Tethered bool     `json:"tethered"`
	// Targets is the file with the addresses of the machines, a line each, that
	// connections to the ports are passed to: the first that answers gets one.
	Targets string `json:"targets,omitempty"`
	Ports   []int  `json:"ports,omitempty"` // of the targets, in the order of the listeners
}

// Main becomes what the executable was called as, if that is something of this
// package, and reports whether it was. code is then the exit code.
func Main(args []string) (code int, was bool) {
	if len(args) == 0 {
		return 0, false
	}
	var err error
	switch args[0] {
	case MachineName:
		err = keepMachine(args)
	case SwitchName:
		err = keepSwitch()
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
