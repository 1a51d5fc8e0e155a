package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/agent"
	"kedge/datastore"
	"kedge/internal/clock"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/footprint"
	"kedge/internal/joining"
	"kedge/internal/lifecycle"
	"kedge/internal/logging"
	"kedge/internal/packed"
	"kedge/internal/preflight"
	"kedge/internal/proxyenv"
	"kedge/runtime"
	"kedge/server"
	"kedge/server/identity"
)

func serverCommand() *cli.Command {
	flags := serverFlags()
	return &cli.Command{
		Name:  "server",
		Usage: "Run the control plane and a node",
		Flags: flags,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("\"kedge server\" takes flags only, not %q", c.Args().First())
			}
			return configured(c, flags, func() error { return runServer(c) })
		},
		Subcommands: serverSubcommands(),
	}
}

// runServer joins others if it is told to, and runs the control plane, and a node
// unless that is disabled.
func runServer(c *cli.Context) error {
	p := &flagParser{c: c}
	dataDir := p.dir("data-dir")
	if err := p.err(); err != nil {
		return err
	}
	if _, _, joined, err := joining.Known(agentDir(dataDir)); err == nil && joined {
		return fmt.Errorf("%s is the data directory of an agent; start it with \"kedge agent\", or choose another with --data-dir", dataDir)
	}
	dir := serverDir(dataDir)
	others, entered, err := server.EnteredBefore(dir)
	if err != nil && !(errors.Is(err, server.ErrEntering) && c.String("server") != "") {
		return err
	}
	first := &others
	if !entered {
		first = nil
	}
	// What is wrong with the flags must be said before a token is spent.
	s, err := compose(c, first)
	if err != nil {
		return err
	}
	if err := s.checkArgs(); err != nil {
		return err
	}
	enter := server.Enter{Dir: dir, StoreDir: s.datastore.Dir, Server: c.String("server"), Token: p.token(), NodeName: s.nodeName, Peers: s.peers()}
	if enter.Server != "" {
		p.fail(joining.Config{Dir: dir, Server: enter.Server, Token: enter.Token}.Validate())
	}
	if err := p.err(); err != nil {
		return err
	}
	err = runNode(c.Context, s, role{
		settle: func(ctx context.Context, s settings, log *slog.Logger) (settings, error) {
			if enter.Server == "" {
				return s, nil
			}
			others, joined, err := enter.Do(ctx, component(log, "join"))
			if err != nil || !joined {
				return s, err
			}
			return compose(c, &others)
		},
		wire: func(group *lifecycle.Group, s settings, log *slog.Logger) error {
			id, err := identity.Prepare(s.server.Identity(), time.Now())
			if err != nil {
				return err
			}
			return wire(group, s, id, log)
		},
		ready: func(s settings, log *slog.Logger) {
			log.Info("other machines can join; \"kedge token create\" prints the command for them", "server", s.cluster.Servers[0])
		},
	})
	if errors.Is(err, datastore.ErrRemoved) {
		// What the others say who miss their store is no news beside this.
		return fmt.Errorf("%w; to join it anew make a token with \"kedge token create --role server\" on another server and give it with --server and --token", datastore.ErrRemoved)
	}
	return err
}

// role is what a server and an agent do differently.
type role struct {
	// settle completes the settings with what has to be asked for.
	settle func(context.Context, settings, *slog.Logger) (settings, error)
	wire   func(*lifecycle.Group, settings, *slog.Logger) error
	ready  func(settings, *slog.Logger) // all components are
}

// runNode prepares what is done once, wires the components, and runs them
// until a signal comes or one of them fails.
func runNode(ctx context.Context, s settings, r role) error {
	footprint.Boot()
	notify := lifecycle.TakeNotifier()
	log := logging.New(os.Stderr, s.log)
	logging.Setup(log)
	if os.Geteuid() != 0 {
		return errNotRoot
	}
	dir, err := datadir.Open(s.dataDir, s.runDir, s.nodeName, version, time.Now())
	if err != nil {
		return err
	}
	defer dir.Close()
	log.Info("kedge starts", "version", version, "node", s.nodeName, "data", s.dataDir)
	ctx, hurry, stop := signals(ctx, log)
	defer stop()
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	logging.OnFatal(func() { giveUp(errGaveUp) })
	if s, err = settle(ctx, s, r, log); err != nil {
		if ctx.Err() != nil {
			return nil // a signal came while it waited
		}
		return err
	}
	for _, w := range s.warnings {
		log.Warn(w)
	}
	if err := os.Unsetenv(launcherVariable); err != nil { // nothing that we start has a use for it
		return err
	}
	if err := stayInside(s); err != nil {
		return err
	}
	if !s.disableAgent {
		agent.RaiseLimits(log)
		if err := checkMachine(ctx, s.preflight, log); err != nil {
			return err
		}
		if _, err := runtime.LoadRegistries(s.runtime.RegistriesFile); err != nil {
			return err // before anything runs that would have to be stopped
		}
		release, err := agent.Prepare(ctx, s.agent)
		if err != nil {
			return err
		}
		defer release()
	}

	var group *lifecycle.Group
	group = lifecycle.New(log, lifecycle.WithHurry(hurry), lifecycle.WithStopLimit(stopLimit), lifecycle.WithOnReady(func() {
		announce(ctx, log, notify, group, s)
		r.ready(s, log)
	}), lifecycle.WithOnStop(func() {
		logging.Stopping()
		_ = notify.Stopping()
	}))
	if err := r.wire(group, s, log); err != nil {
		return err
	}
	// A start that takes longer than this has trouble, which must be seen.
	time.AfterFunc(startNoise, logging.Settled)
	err = group.Run(ctx)
	if cause := context.Cause(ctx); err == nil && errors.Is(cause, errGaveUp) {
		return cause
	}
	return err
}

// settle waits for what has to be right before anything else, and completes the settings.
func settle(ctx context.Context, s settings, r role, log *slog.Logger) (settings, error) {
	e := &early{began: time.Now()}
	e.step("clock", "it shows a time before this kedge was built; set it, or connect a time server")
	defer e.answer(ctx, s, log)()
	if err := clock.Wait(ctx, buildTime(), log); err != nil {
		return settings{}, err
	}
	e.step("join", "asks the cluster's servers; the log says what they answer")
	return r.settle(ctx, s, log)
}

// stayInside exempts the cluster from the proxy that the environment may name. Nothing
// may have asked for that before: what is found then is kept.
func stayInside(s settings) error {
	inside := []string{".svc", "." + s.cluster.ClusterDomain, joining.NodeAddresses.String()}
	for _, r := range slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs) {
		inside = append(inside, r.String())
	}
	if no := proxyenv.NoProxy(os.Getenv, inside...); no != "" {
		return os.Setenv("NO_PROXY", no)
	}
	return nil
}

var errGaveUp = errors.New("an embedded component gave up; its last messages say why")

// checkMachine fails when something is missing without which no pod can run, and
// warns of the rest.
func checkMachine(ctx context.Context, c preflight.Config, log *slog.Logger) error {
	results, err := preflight.Required(ctx, c)
	for _, r := range results {
		if r.Level == preflight.Warning {
			log.Warn(r.Message, "check", r.Check, "remedy", r.Remedy)
		}
	}
	return err
}

// signals returns a context that the first signal ends, and a channel that the
// second one closes.
func signals(ctx context.Context, log *slog.Logger) (stopping context.Context, hurry <-chan struct{}, release func()) {
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

// announce tells the log and the service manager that start-up is complete, and ends
// what was for the start alone.
func announce(ctx context.Context, log *slog.Logger, notify lifecycle.Notifier, group *lifecycle.Group, s settings) {
	started := group.Status(nil) //nolint:staticcheck // nil: do not ask checkers
	if s.log.Format == logging.JSON {
		lifecycle.LogTable(log, started)
	} else {
		var table strings.Builder
		_ = lifecycle.WriteTable(&table, started)
		fmt.Fprint(os.Stderr, table.String())
	}
	if err := notify.Ready(); err != nil {
		log.Warn("the service manager was not told", "err", err)
	}
	// The first pods come now; what the start needed is given back after them.
	time.AfterFunc(settleAfter, func() {
		logging.Settled()
		if err := footprint.Settle(); err != nil {
			log.Debug("this process takes more than it needs", "err", err)
		}
		go footprint.Tend(ctx)
		if err := keepProgram(s.dataDir); err != nil {
			log.Warn("the unpacked program may not survive a power cut; the next start unpacks it again", "err", err)
		}
	})
}

// keepProgram makes durable what the launcher has unpacked for us.
func keepProgram(dataDir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	return packed.Keep(filepath.Join(dataDir, "program"), self)
}

// stopLimit leaves a second of the ten within which a process is gone that was told to stop.
const stopLimit = 9 * time.Second

// startNoise is how long lines that are normal while a node starts are kept out of
// the log, if it does not get ready before.
const startNoise = 20 * time.Second

// settleAfter is how long after everything is ready the start counts as over.
const settleAfter = 10 * time.Second

// reporter answers "kedge status".
func reporter(group *lifecycle.Group, node string) func(context.Context) control.Report {
	started := time.Now()
	return func(ctx context.Context) control.Report {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		return reportOf(node, started, group.Status(ctx))
	}
}

func reportOf(node string, started time.Time, components []lifecycle.Status) control.Report {
	return control.Report{
		Version: version, Node: node, PID: os.Getpid(), Started: started,
		Memory: control.OwnMemory(), Components: components,
	}
}
