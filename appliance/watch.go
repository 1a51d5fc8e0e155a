package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
	"kedge/launcher/bootguard"
)

// watchLimit ends a trial whose new version always makes progress and is never ready.
const watchLimit = 30 * time.Minute

// Watch watches the new version of a trial, gives the verdict and carries it out. It is the work of "kedge upgrade watch",
// which the launcher starts with the executable of before, beside the node and not as a part of it. It returns at once if
// there is no trial, or another process watches it.
//
// A node that is stopped by its administrator gets no verdict: the next start goes on with the trial.
func (m Machine) Watch(ctx context.Context, dataDir string) error {
	if _, _, err := m.readTrial(dataDir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	lock, err := m.lockWatch(dataDir)
	if err != nil || lock == nil {
		return err // another watches
	}
	defer lock.Close()
	for told := ""; ; {
		err := m.watch(ctx, dataDir)
		if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, unix.EDQUOT) {
			return err
		}
		// Without its end the trial would last until the next start. With room again the new version may be healthy.
		if err.Error() != told {
			told = err.Error()
			fmt.Fprintf(os.Stderr, "kedge upgrade: the upgrade goes on when there is free disk space: %v\n", err)
		}
		if err := Sleep(ctx, spaceInterval); err != nil {
			return nil
		}
	}
}

// spaceInterval is the interval at which the end of a trial is tried again on a full disk.
const spaceInterval = 5 * time.Second

// watch is [Machine.Watch] with the lock of the process that watches.
func (m Machine) watch(ctx context.Context, dataDir string) error {
	if err := m.at("watch the trial"); err != nil {
		return err
	}
	// Another may have ended the trial before it gave the lock back.
	t, d, err := m.readTrial(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	w := watching{machine: m, dataDir: dataDir, trial: t, details: d}
	v, found, err := bootguard.ReadVerdict(m.path(dataDir), t)
	if err == nil && !found {
		if v, found, err = w.judge(ctx); err == nil && !found {
			return nil
		}
	}
	if err != nil {
		return err
	}
	if v.Proven {
		return w.keepNew()
	}
	return w.goBack(ctx, v)
}

// lockWatch takes the lock of the process that watches; nil if another has it.
func (m Machine) lockWatch(dataDir string) (*os.File, error) {
	lock, err := os.OpenFile(m.path(bootguard.Path(dataDir, "watch.lock")), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(lock.Fd(), unix.F_OFD_SETLK, &whole); err != nil {
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			err = nil
		}
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// watched reports whether a process watches a trial. The question takes no lock, so that it keeps no process from watching.
func (m Machine) watched(dataDir string) bool {
	lock, err := os.Open(m.path(bootguard.Path(dataDir, "watch.lock")))
	if err != nil {
		return false
	}
	defer lock.Close()
	whole := unix.Flock_t{Type: unix.F_WRLCK}
	err = unix.FcntlFlock(lock.Fd(), unix.F_OFD_GETLK, &whole)
	return err == nil && whole.Type != unix.F_UNLCK
}

// watching is the watch over one trial.
type watching struct {
	machine Machine
	dataDir string
	trial   bootguard.Trial
	details trialDetails
}

// errStopped means that the administrator has stopped the node.
var errStopped = errors.New("the node was stopped")

// errNotRecorded means that the launcher has started the version of before, because it could not record the start of the new one.
var errNotRecorded = errors.New("its start could not be recorded, so the version of before was started; the disk may be full")

// errDecided means that another has given the verdict, for example the launcher after too many starts.
var errDecided = errors.New("the trial has a verdict")

// judge waits until the new version is healthy or not, and gives the verdict. found is false if there is none.
func (w watching) judge(ctx context.Context) (v bootguard.Verdict, found bool, err error) {
	err = w.untilHealthy(ctx)
	switch {
	case errors.Is(err, errStopped), ctx.Err() != nil:
		return v, false, nil
	case errors.Is(err, errDecided):
	case err == nil:
		return w.decide(true, "")
	default:
		return w.decide(false, err.Error())
	}
	return bootguard.ReadVerdict(w.machine.path(w.dataDir), w.trial)
}

func (w watching) decide(proven bool, reason string) (bootguard.Verdict, bool, error) {
	v, err := bootguard.Decide(w.machine.path(w.dataDir), w.trial, proven, reason)
	return v, err == nil, err
}

// untilHealthy returns nil when the new version has been healthy for as long as wanted.
func (w watching) untilHealthy(ctx context.Context) error {
	ctx, decided := context.WithCancelCause(ctx)
	defer decided(nil)
	ctx, cancel := context.WithTimeoutCause(ctx, watchLimit, fmt.Errorf("it was not ready within %s", watchLimit))
	defer cancel()
	waiter := Waiter{Report: w.report, Service: w.service, Patience: w.details.Patience, Besides: manifests, Show: func(p Progress, _ bool) {
		if _, found, err := bootguard.ReadVerdict(w.machine.path(w.dataDir), w.trial); err == nil && found {
			decided(errDecided)
		} else if p.Component == "" && w.baseRuns(ctx) {
			decided(errNotRecorded)
		}
	}}
	if w.details.HasNode {
		waiter.Node = w.api().NodeReady
	}
	for {
		if err := waiter.Wait(ctx); err != nil {
			return w.cause(ctx, err)
		}
		stayed, err := w.staysHealthy(ctx)
		if err != nil {
			return w.cause(ctx, err)
		}
		if stayed {
			return nil
		}
	}
}

// manifests is the component that applies the manifests of a bundle. They are the user's: that one cannot be applied is not the
// fault of a version.
const manifests = "manifests"

// cause returns why the waiting ended, which is not always its error.
func (w watching) cause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if !errors.Is(err, ErrEnded) {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	if state, err := w.machine.Manager.State(ctx); err == nil && !state.Failed {
		return errStopped
	}
	if words := w.machine.Manager.LastWords(ctx); words != "" {
		err = fmt.Errorf("%w; its last error: %s", err, words)
	}
	return err
}

// staysHealthy reports whether the node stays ready for as long as wanted, and the containers of before go on running. An
// error is a fault that waiting cannot mend.
func (w watching) staysHealthy(ctx context.Context) (bool, error) {
	for begin := time.Now(); time.Since(begin) < w.details.Observe; {
		if err := Sleep(ctx, time.Second); err != nil {
			return false, err
		}
		r, err := w.report(ctx)
		if err != nil {
			return false, nil
		}
		for _, c := range r.Components {
			if c.Name != manifests && (c.State != lifecycle.Ready || c.Error != "") {
				return false, nil
			}
		}
		if !w.details.HasNode {
			continue
		}
		if ready, _, err := w.api().NodeReady(ctx, r.Node); err != nil || !ready {
			return false, nil
		}
		pods, err := w.api().Pods(ctx, r.Node)
		if err != nil {
			return false, nil
		}
		if err := restarted(w.details.Containers, pods); err != nil {
			return false, err
		}
	}
	return true, nil
}

func (w watching) api() nodeAPI {
	return nodeAPI{DataDir: w.dataDir, Kubeconfig: w.details.Kubeconfig}
}

// errNotStarted means that the new version does not answer.
var errNotStarted = errors.New("the new version does not answer")

// report returns the report of the new version, and an error while another version runs.
func (w watching) report(ctx context.Context) (control.Report, error) {
	starts, err := bootguard.ReadStarts(w.machine.path(w.dataDir), w.trial)
	if err != nil {
		return control.Report{}, err
	}
	r, err := control.GetReport(ctx, w.details.RunDir)
	if err == nil && r.PID != starts.PID {
		err = errNotStarted
	}
	return r, err
}

// service returns the state of the service. A node that runs without the service manager is as good.
func (w watching) service(ctx context.Context) (ServiceState, error) {
	if w.runs() {
		return ServiceState{Active: true}, nil
	}
	return w.supervision(ctx)
}

// supervision returns the state of the service. Without a service manager nobody knows, and what has started the node is taken
// to start it again.
func (w watching) supervision(ctx context.Context) (ServiceState, error) {
	if w.machine.Manager.Name() == "" {
		return ServiceState{Active: true}, nil
	}
	return w.machine.Manager.State(ctx)
}

// runs reports whether the process of the last start of the new version exists.
func (w watching) runs() bool {
	starts, err := bootguard.ReadStarts(w.machine.path(w.dataDir), w.trial)
	return err == nil && starts.PID > 0 && !starts.Back && w.isNode(starts.PID)
}

// isNode reports whether a process is the node: its number may be another process's by now.
func (w watching) isNode(pid int) bool {
	if r, err := control.GetReport(context.Background(), w.details.RunDir); err == nil {
		return r.PID == pid
	}
	for _, dir := range []string{"program", bootguard.Folder} {
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err == nil && strings.HasPrefix(exe, w.machine.path(filepath.Join(w.dataDir, dir))+"/") {
			return true
		}
	}
	return false
}

// keepNew makes the new version the installed one. Each step can be repeated after it was interrupted.
func (w watching) keepNew() error {
	m, d := w.machine, w.details
	previous := filepath.Join(w.dataDir, "previous", serviceName)
	if w.trial.Base != previous && w.baseIsInPlace() {
		if err := m.keepPrevious(m.path(w.trial.Base), m.path(previous)); err != nil {
			return err
		}
	}
	switch err := copyTo(m.path(w.trial.Candidate), m.path(d.Program), 0o755); {
	case errors.Is(err, fs.ErrNotExist):
		if sum, hashErr := hashFile(m.path(d.Program)); hashErr == nil && sum == d.To.Hash {
			break // it was in its place already
		}
		// No later attempt can succeed, and the trial would be in the way of every other upgrade.
		return w.end(Outcome{Result: WentBack, Reason: fmt.Sprintf("the new executable was removed before it was in its place: %v", err)})
	case err != nil:
		return err
	}
	if err := m.recordProgram(w.dataDir, d); err != nil {
		return err
	}
	return w.end(Outcome{Result: Upgraded})
}

// baseIsInPlace reports whether the executable of before is still where the service starts it: not if this was interrupted.
func (w watching) baseIsInPlace() bool {
	sum, err := hashFile(w.machine.path(w.trial.Base))
	return err == nil && sum == w.details.From.Hash
}

// recordProgram puts the new executable into the journal of the installation, if there is one.
func (m Machine) recordProgram(dataDir string, d trialDetails) error {
	j, err := m.readJournal(dataDir)
	if errors.Is(err, ErrNoJournal) {
		return nil
	}
	if err != nil {
		return err
	}
	e := j.find(FileEntry, d.Program)
	if e == nil {
		return nil
	}
	e.Hash, e.Next = d.To.Hash, ""
	j.Version = d.To.Version
	return m.save(j)
}

// Limits of the way back.
const (
	endLimit  = 20 * time.Second // for the new version to end
	backLimit = 5 * time.Minute  // for the version of before to start
)

// goBack makes the version of before run again.
func (w watching) goBack(ctx context.Context, v bootguard.Verdict) error {
	m, d := w.machine, w.details
	fmt.Fprintf(os.Stderr, "kedge upgrade: the upgrade to %s is undone: %s\n", d.To, v.Reason)
	if state, err := m.Manager.State(ctx); m.Manager.Name() != "" && (err == nil && (state.Active || state.Failed) && !w.isBack()) {
		if err := m.Manager.Restart(ctx); err != nil {
			return err
		}
	} else if err := w.endProcess(ctx); err != nil {
		return err
	}
	// The launcher brings the data back at the next start, and needs the trial for it.
	for begin := time.Now(); !w.isBack(); {
		if time.Since(begin) > backLimit || ctx.Err() != nil {
			return fmt.Errorf("kedge was not started again; the upgrade is undone by its next start")
		}
		if err := Sleep(ctx, pollInterval); err != nil {
			return err
		}
	}
	w.untilBack(ctx)
	// Not before: where the version of before does not know the boot guard, the launcher in its place is the one that starts it
	// with its data, and that goes on with this if it is interrupted.
	if w.trial.Base != d.Program {
		if err := copyTo(m.path(w.trial.Base), m.path(d.Program), 0o755); err != nil {
			return err
		}
	}
	return w.end(Outcome{Result: WentBack, Reason: v.Reason})
}

// untilBack waits until the version of before is ready, so that who follows the upgrade finds a node that answers. If it is
// not, that is no fault of the upgrade. The patience that the user has given is for the new version: a machine that starts
// more slowly gets its time here.
func (w watching) untilBack(ctx context.Context) {
	waiter := Waiter{Report: func(ctx context.Context) (control.Report, error) { return control.GetReport(ctx, w.details.RunDir) },
		Service: w.supervision, Patience: backLimit, Show: func(Progress, bool) {}}
	if w.details.HasNode {
		waiter.Node = w.api().NodeReady
	}
	ctx, cancel := context.WithTimeout(ctx, backLimit)
	defer cancel()
	if err := waiter.Wait(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "kedge upgrade: %s runs again, and is not ready: %v\n", w.details.From, err)
	}
}

// isBack reports whether the version of before was started after the verdict, or instead of the new one.
func (w watching) isBack() bool {
	starts, err := bootguard.ReadStarts(w.machine.path(w.dataDir), w.trial)
	return err == nil && starts.Back || w.baseRuns(context.Background())
}

// baseRuns reports whether the version of before runs. The launcher starts it although there is no verdict if it cannot record
// the start of the new version, and if there is no data that has to come back first.
func (w watching) baseRuns(ctx context.Context) bool {
	r, err := control.GetReport(ctx, w.details.RunDir)
	if err != nil {
		return false
	}
	values, err := environment(r.PID)
	if err != nil {
		return false
	}
	runs, err := os.Stat(values["KEDGE_LAUNCHER"]) // folders of the two paths may be links
	if err != nil {
		return false
	}
	base, err := os.Stat(w.machine.path(w.trial.Base))
	return err == nil && os.SameFile(runs, base)
}

// endProcess ends the new version where no service manager does. Whoever has started the node starts it again.
func (w watching) endProcess(ctx context.Context) error {
	starts, err := bootguard.ReadStarts(w.machine.path(w.dataDir), w.trial)
	if err != nil || starts.PID == 0 || starts.Back || !w.isNode(starts.PID) {
		return err
	}
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		if err := unix.Kill(starts.PID, signal); errors.Is(err, unix.ESRCH) {
			return nil
		} else if err != nil {
			return err
		}
		for begin := time.Now(); time.Since(begin) < endLimit; {
			if !w.isNode(starts.PID) {
				return nil
			}
			if err := Sleep(ctx, pollInterval); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("process %d of the new version does not end", starts.PID)
}

// end records the outcome and ends the trial.
func (w watching) end(o Outcome) error {
	o.ID, o.Begin, o.From, o.To, o.End = w.trial.ID, w.details.Begin, w.details.From, w.details.To, time.Now().UTC().Truncate(time.Second)
	o.Snapshot = w.details.Snapshot
	if err := w.machine.addOutcome(w.dataDir, o); err != nil {
		return err
	}
	return bootguard.End(w.machine.path(w.dataDir))
}
