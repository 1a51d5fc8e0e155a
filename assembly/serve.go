package assembly

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/agent"
	"kedge/appliance/parameters"
	"kedge/assembly/proxyenv"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/footprint"
	"kedge/internal/fswatch"
	"kedge/internal/joining"
	"kedge/internal/lifecycle"
	"kedge/internal/logging"
	"kedge/launcher/bootguard"
	"kedge/launcher/packedprogram"
	"kedge/preflight"
	"kedge/runtime"
	"kedge/settings"
)

// hooks has the differences between a server's process and an agent's.
type hooks struct {
	// settle completes the configuration with the parts that come from other servers.
	settle func(context.Context, *datadir.Dir, *slog.Logger) (Config, error)
	wire   func(*lifecycle.Group, Config, *datadir.Dir, *slog.Logger) error
	ready  func(Config, *slog.Logger) // called when the start is complete
	// onlyNode means that the process has no purpose but its node: it exits, for the service manager to start
	// it again, when a component of the node cannot be restarted.
	onlyNode bool
}

// runNode makes the one-time preparations, wires the components, and runs them until a signal arrives or one of
// them fails.
func runNode(ctx context.Context, build Build, s Config, r hooks) (err error) {
	resetProcess()
	footprint.Boot()
	notify := lifecycle.TakeNotifier()
	var out io.Writer = os.Stderr
	if s.logFile != "" {
		if out, err = logging.OpenFile(s.logFile); err != nil {
			return err
		}
	}
	log := logging.New(out, s.log)
	logging.Setup(log)
	dir, err := openDirs(build, s)
	if err != nil {
		return err
	}
	defer dir.Close()
	defer func() {
		if errors.Is(err, unix.EROFS) { // below the data or the run directory
			err = fmt.Errorf("%w; make that file system writable", err)
		}
	}()
	log.Info("kedge starts", "version", build.Version, "node", s.NodeName, "data", s.DataDir)
	ctx, fast, stop := signals(ctx, log)
	defer stop()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	logging.OnFatal(func() { fail(errExited) })
	if s, err = settle(ctx, build, s, r, dir, log); err != nil {
		if ctx.Err() != nil {
			return nil // a signal arrived during settle
		}
		return err
	}
	for _, w := range s.warnings {
		log.Warn(w)
	}
	s.Preflight.Exists = dir.Existed()
	release, err := prepareMachine(ctx, s, log)
	if err != nil {
		return err
	}
	defer release()

	var group *lifecycle.Group
	options := []lifecycle.Option{lifecycle.WithFastStop(fast), lifecycle.WithStopLimit(stopLimit), lifecycle.WithOnReady(func() {
		announce(ctx, log, notify, group, s)
		r.ready(s, log)
	}), lifecycle.WithOnStop(func() {
		logging.Stopping()
		_ = notify.Stopping()
	})}
	if r.onlyNode {
		options = append(options, lifecycle.WithFinalFailuresEnd())
	}
	group = lifecycle.New(log, options...)
	watchDirs(group, s, dir, log)
	if err := r.wire(group, s, dir, log); err != nil {
		return err
	}
	// A start that takes longer than this has a problem, whose messages must be visible.
	time.AfterFunc(quietStart, logging.Settled)
	err = group.Run(ctx)
	if cause := context.Cause(ctx); err == nil && errors.Is(cause, errExited) {
		return cause
	}
	return err
}

// prepareMachine prepares the process's environment and the machine for the components, and checks the machine. release
// undoes what must not outlive the process.
func prepareMachine(ctx context.Context, s Config, log *slog.Logger) (release func() error, err error) {
	for _, name := range []string{settings.LauncherVariable, settings.StartedByVariable} { // child processes do not need them
		if err := os.Unsetenv(name); err != nil {
			return nil, err
		}
	}
	if err := exemptFromProxy(s); err != nil {
		return nil, err
	}
	if !s.parts.Node {
		return func() error { return nil }, checkMachine(ctx, s.Preflight, log)
	}
	if err := parameters.Remember("/", s.RunDir); err != nil {
		log.Warn("\"kedge uninstall\" will not restore kernel parameters", "err", err)
	}
	agent.RaiseLimits(log)
	if err := checkMachine(ctx, s.Preflight, log); err != nil {
		return nil, err
	}
	if _, err := runtime.LoadRegistries(s.runtime.RegistriesFile); err != nil {
		return nil, errorkind.Permanent(err) // before components run that would have to be stopped
	}
	return agent.Prepare(ctx, s.agent)
}

// watchDirs adds the components that watch the data and the run directory.
func watchDirs(group *lifecycle.Group, s Config, dir *datadir.Dir, log *slog.Logger) {
	group.AddRestarted(fswatch.NewDisk(s.DataDir, component(log, "disk")))
	group.AddRestarted(lifecycle.Func("rundir", func(ctx context.Context, ready func()) error {
		ready()
		return dir.Guard(ctx, func(path string) {
			component(log, "rundir").Error("the run directory was removed while kedge ran: sockets are created again, and pods are started again, as after a reboot", "path", path)
		})
	}))
}

// openDirs locks the data and the run directory. Only the errors that cannot pass by themselves are permanent.
func openDirs(build Build, s Config) (*datadir.Dir, error) {
	dir, err := datadir.Open(s.DataDir, s.RunDir, s.NodeName, build.Version, time.Now())
	if errors.Is(err, datadir.ErrOtherNode) || errors.Is(err, datadir.ErrNewer) || errors.Is(err, datadir.ErrDamaged) {
		err = errorkind.Permanent(err)
	}
	return dir, err
}

// resetProcess makes the process independent of how it was started. The files of images would have a shell's
// umask, so that pods without root could not read them; and containers would inherit an ignored signal, as set
// by nohup.
func resetProcess() {
	unix.Umask(0o022)
	if signal.Ignored(syscall.SIGHUP) {
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP) // the signal is caught and dropped
	}
}

// settle waits for a plausible clock, and completes the configuration.
func settle(ctx context.Context, build Build, s Config, r hooks, owned *datadir.Dir, log *slog.Logger) (Config, error) {
	e := &earlyStatus{build: build, began: time.Now()}
	e.step("clock", "the clock shows a time before this kedge was built; set it, or connect a time server")
	defer e.answer(ctx, s, log)()
	if err := preflight.WaitForClock(ctx, build.Time, log); err != nil {
		return Config{}, err
	}
	e.step("join", "preparing, or joining the cluster; see the log for the answers of its servers")
	return r.settle(ctx, owned, log)
}

// exemptFromProxy exempts the cluster from the proxy in the environment. It must run before the first use of the
// proxy settings, because Go caches them.
func exemptFromProxy(s Config) error {
	inside := []string{".svc", "." + s.cluster.ClusterDomain, joining.NodeAddresses.String()}
	for _, r := range slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs) {
		inside = append(inside, r.String())
	}
	if no := proxyenv.NoProxy(os.Getenv, inside...); no != "" {
		return os.Setenv("NO_PROXY", no)
	}
	return nil
}

var errExited = errors.New("an embedded component exited; its last log messages have the reason")

// checkMachine fails if a requirement for running pods is missing, and logs warnings for the rest. Errors of ports, of disk
// space and of the two directories, which may be mounted later, may pass by themselves; other errors are permanent.
func checkMachine(ctx context.Context, c preflight.Config, log *slog.Logger) error {
	results, err := preflight.Required(ctx, c)
	for _, r := range results {
		if r.Level == preflight.Warning {
			log.Warn(r.Message, "check", r.Check, "remedy", r.Remedy)
		}
	}
	passes := func(r preflight.Result) bool {
		return r.Level != preflight.Error || slices.Contains([]string{"data-directory", "run-directory", "disk-space", "ports"}, r.Check)
	}
	for _, r := range results {
		if !passes(r) {
			return errorkind.Permanent(err)
		}
	}
	return err
}

// signals returns a context that is cancelled by the first SIGTERM or SIGINT, and a channel that is closed by
// the second.
func signals(ctx context.Context, log *slog.Logger) (stopping context.Context, fast <-chan struct{}, release func()) {
	stopping, cancel := context.WithCancelCause(ctx)
	second := make(chan struct{})
	c := make(chan os.Signal, 2)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		for n := 0; ; n++ {
			sig, ok := <-c
			switch {
			case !ok:
				return
			case n == 0:
				log.Info("stopping; containers go on running", "signal", sig)
				cancel(errors.New("signal: " + sig.String()))
			case n == 1:
				log.Warn("stopping at once", "signal", sig)
				close(second)
			}
		}
	}()
	return stopping, second, func() {
		signal.Stop(c)
		close(c)
		cancel(nil)
	}
}

// announce reports to the log and the service manager that the start is complete, and schedules the end of what
// only the start needs.
func announce(ctx context.Context, log *slog.Logger, notify lifecycle.Notifier, group *lifecycle.Group, s Config) {
	started := group.Status(nil) //nolint:staticcheck // nil: do not ask checkers
	if s.log.Format == logging.JSON {
		lifecycle.LogTable(log, started)
	} else {
		var table strings.Builder
		_ = lifecycle.WriteTable(&table, started)
		fmt.Fprint(os.Stderr, table.String())
	}
	if err := notify.Ready(); err != nil {
		log.Warn("the service manager could not be notified", "err", err)
	}
	// The first pods start now; memory of the start is released after them.
	time.AfterFunc(startEnd, func() {
		logging.Settled()
		if err := footprint.Settle(); err != nil {
			log.Debug("memory of the start could not be released", "err", err)
		}
		go footprint.Tend(ctx)
		if err := keepProgram(s.DataDir, s.network.Plugin); err != nil {
			log.Warn("the unpacked program may not survive a power cut; the next start unpacks it again", "err", err)
		}
	})
}

// processStarted is when this process started.
var processStarted = time.Now()

// keepProgram syncs the program that the launcher has unpacked to disk, and removes earlier ones. During the trial of an
// upgrade the program before it stays, because it may come back.
func keepProgram(dataDir, launcher string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	others := 0
	if _, err := bootguard.ReadTrial(dataDir); err == nil {
		others = 1
	} else if err := bootguard.Tidy(dataDir, launcher, processStarted); err != nil {
		return err
	}
	return packedprogram.Keep(filepath.Join(dataDir, "program"), self, others)
}

// stopLimit leaves one second of the ten that service managers usually grant a process for stopping.
const stopLimit = 9 * time.Second

// quietStart is how long messages that are normal during a start are suppressed if the node is not ready
// earlier.
const quietStart = 20 * time.Second

// startEnd is the delay between readiness and the end of the start.
const startEnd = 10 * time.Second

// reporter returns the handler of "kedge status".
func reporter(build Build, group *lifecycle.Group, node string) func(context.Context) control.Report {
	started := time.Now()
	return func(ctx context.Context) control.Report {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		return reportOf(build, node, started, fswatch.Excuse(group.Status(ctx)))
	}
}

func reportOf(build Build, node string, started time.Time, components []lifecycle.Status) control.Report {
	return control.Report{
		Version: build.Version, Node: node, PID: os.Getpid(), Started: started,
		Memory: control.OwnMemory(), Components: components,
	}
}
