package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"kedge/internal/datadir"
	"kedge/launcher/bootguard"
)

// Variables by which launchers speak with each other. The large program sees only startedByVariable.
const (
	// guardedVariable says that another launcher has chosen this executable, and has that one's path.
	guardedVariable = "KEDGE_GUARDED"
	// unpackVariable names the folder in which to unpack the program, so that the next start finds it there.
	unpackVariable = "KEDGE_UNPACK_INTO"
	// detachVariable makes the launcher start itself again as an orphan, so that the process that watches an upgrade is
	// no child of the node, which would have to wait for its end.
	detachVariable = "KEDGE_DETACH"
	// startedByVariable tells the program which launcher was started, if that one has chosen this executable: an upgrade
	// replaces what was started, and not the copy of an upgrade before.
	startedByVariable = "KEDGE_STARTED_BY"
)

// takeVariables removes the launchers' variables from env and returns their values.
func takeVariables(env []string) (others []string, taken map[string]string) {
	taken = map[string]string{}
	for _, v := range env {
		switch name, value, _ := strings.Cut(v, "="); name {
		case guardedVariable, unpackVariable, detachVariable, startedByVariable:
			taken[name] = value
		default:
			others = append(others, v)
		}
	}
	return others, taken
}

// guard executes another executable in place of this one if an upgrade of the node is on trial and the other is to run.
// See package bootguard.
func guard(dataDir, self string, args, env []string) error {
	if _, err := os.Stat(bootguard.Path(dataDir)); err != nil {
		return nil // there was never an upgrade
	}
	lock, err := datadir.TryLock(dataDir)
	if err != nil {
		return nil // the program says better what is wrong, and no start counts
	}
	choice := bootguard.Choose(dataDir, self)
	if err := lock.Close(); err != nil {
		return err
	}
	if choice.Note != "" {
		fmt.Fprintln(os.Stderr, "kedge upgrade:", choice.Note)
	}
	if choice.Watcher != "" {
		if err := startWatching(choice.Watcher, dataDir, env); err != nil {
			fmt.Fprintln(os.Stderr, "kedge upgrade: the upgrade is not watched, and the version before it comes back after some starts:", err)
		}
	}
	if choice.Fail != nil {
		return choice.Fail
	}
	if choice.Run == "" {
		return nil
	}
	err = fmt.Errorf("start %s: %w", choice.Run, syscall.Exec(choice.Run, args, append(env, guardedVariable+"="+self)))
	if choice.Run == choice.Base {
		return err
	}
	// The new executable is damaged, or of another architecture: the base runs.
	t, readErr := bootguard.ReadTrial(dataDir)
	if readErr == nil {
		_, readErr = bootguard.Decide(dataDir, t, false, err.Error())
	}
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	return guard(dataDir, self, args, env)
}

// startWatching starts the process that watches an upgrade. It ends by itself if another watches already.
func startWatching(watcher, dataDir string, env []string) error {
	cmd := exec.Command(watcher, "upgrade", "watch", "--data-dir="+dataDir)
	cmd.Env = append(env, detachVariable+"=1")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Run()
}

// detach starts this executable again with the same arguments, and does not wait for it.
func detach(self string, args, env []string) error {
	cmd := exec.Command(self, args[1:]...)
	cmd.Env = env
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd.Start()
}
