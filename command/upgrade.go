package command

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/internal/errorkind"
	"kedge/settings"
)

// upgradeSettings are the settings of "kedge upgrade" itself.
var upgradeSettings = struct {
	file, url, version, channel settings.Of[string]
	observe, wait               settings.Of[time.Duration]
	noWait, all, drain          settings.Of[bool]
	parallel                    settings.Of[int]
}{
	file: settings.Text(settings.Setting{Name: "file", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Take the new executable from `FILE`"}),
	url: settings.Text(settings.Setting{Name: "url", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Fetch the new executable from the folder of a release at `URL`"}),
	version: settings.Text(settings.Setting{Name: "version", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Fetch `VERSION` from $KEDGE_URL (default: " + appliance.DefaultReleases + ")"}),
	channel: settings.Text(settings.Setting{Name: "channel", Category: settings.Installation, Default: "stable", NoVar: true, NoKey: true,
		Help: "`CHANNEL` whose newest version is fetched: stable or latest"}),
	observe: settings.Duration(settings.Setting{Name: "observe", Category: settings.Installation, Default: appliance.DefaultObserve.String(), NoVar: true, NoKey: true,
		Help: "`TIME` for which the new version must be healthy before it stays"}),
	wait: settings.Duration(settings.Setting{Name: "wait", Category: settings.Installation, Default: appliance.DefaultPatience.String(), NoVar: true, NoKey: true,
		Help: "`TIME` without progress after which the new version is given up"}),
	noWait: settings.Switch(settings.Setting{Name: "no-wait", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Return when the upgrade has begun; it goes on by itself"}),
	all: settings.Switch(settings.Setting{Name: "all", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Upgrade all nodes of the cluster: the servers one by one, then the agents; on a server"}),
	drain: settings.Switch(settings.Setting{Name: "drain", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "With --all, evict the pods of each node before its upgrade"}),
	parallel: settings.Number(settings.Setting{Name: "parallel", Category: settings.Installation, Default: "1", NoVar: true, NoKey: true,
		Help: "With --all, upgrade `NUMBER` agents at a time"}),
}

func (p *Program) upgradeCommand() *cli.Command {
	u := upgradeSettings
	format := output("table", "json")
	cmd := leaf(cli.Command{
		Name:  "upgrade",
		Usage: "Replace this node's kedge by another version, and go back by itself if that is not healthy",
		Description: "The new executable is verified, and checks the machine and the configuration, before the node is touched.\n" +
			"The node then restarts with it; containers go on running. The new version stays when all components and the\n" +
			"node are ready for a while and no container was restarted. Otherwise, or after three starts, the version of\n" +
			"before comes back, with its data if the format has changed. Without --file, --url and --version the running\n" +
			"executable is taken if it is not the installed one, and else the newest release.",
	}, append(nodeRows(), rowsOf(u.file, u.url, u.version, u.channel, u.observe, u.wait, u.noWait, u.all, u.drain, u.parallel)...), p.upgrade)
	cmd.Subcommands = []*cli.Command{
		leaf(cli.Command{Name: "status", Usage: "Show the upgrade that is on trial, and the result of the last one"}, append(nodeRows(), format.Row()), func(c *call) error {
			return c.upgradeStatus(format.In(c.values) == "json")
		}),
		leaf(cli.Command{Name: "ls", Usage: "List the upgrades of this node"}, append(nodeRows(), format.Row()), func(c *call) error {
			return c.listUpgrades(format.In(c.values) == "json")
		}),
		leaf(cli.Command{
			Name: "rollback", Usage: "Go back to the version before the last upgrade, or before the one that is on trial",
			Description: "It is an upgrade to the earlier version, with the same checks and the same way back.",
		}, append(nodeRows(), rowsOf(u.observe, u.wait, u.noWait)...), p.rollback),
		leaf(cli.Command{Name: "watch", Usage: "Watch the upgrade that is on trial; the launcher starts this", Hidden: true}, rowsOf(settings.DataDir), func(c *call) error {
			return watchUpgrade(c)
		}),
	}
	return cmd
}

// upgrade upgrades the node to the executable that the user has named.
func (p *Program) upgrade(c *call) error {
	if err := needRoot("upgrade kedge"); err != nil {
		return err
	}
	source, err := p.upgradeSource(c.values)
	if err != nil {
		return err
	}
	in, machine, err := c.upgradeOf()
	if err != nil {
		return err
	}
	if upgradeSettings.all.In(c.values) {
		return p.upgradeAll(c, source, in, machine)
	}
	dir, err := os.MkdirTemp("", "kedge-upgrade-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var note string
	if in.File, note, err = source.Take(c.ctx, dir); err != nil {
		return err
	}
	if note != "" {
		fmt.Fprintln(c.errOut, "kedge:", note)
	}
	if err := refuseBundle(in.File); err != nil {
		return err
	}
	return c.runUpgrade(machine, in, upgradeSettings.noWait.In(c.values))
}

// upgradeSource returns where the new executable comes from.
func (p *Program) upgradeSource(v settings.Values) (s appliance.Source, err error) {
	u := upgradeSettings
	s = appliance.Source{File: u.file.In(v), URL: u.url.In(v), Version: u.version.In(v), Channel: u.channel.In(v), Base: os.Getenv("KEDGE_URL")}
	given := 0
	for _, text := range []string{s.File, s.URL, s.Version} {
		if text != "" {
			given++
		}
	}
	if given > 1 {
		return s, errorkind.BadSetting(u.file.Name, ", --%s and --%s exclude each other; give one", u.url.Name, u.version.Name)
	}
	if s.Base == "" {
		s.Base = appliance.DefaultReleases
	}
	if s.Keys, err = release.Trusted(release.TrustedKeysFile); err != nil {
		return s, errorkind.Permanent(err)
	}
	s.Client = appliance.DownloadClient()
	dataDir, err := filepath.Abs(settings.DataDir.In(v))
	if err != nil {
		return s, err
	}
	self, err := p.executable()
	if err == nil && given == 0 && !u.channel.IsSet(v) && !(appliance.Machine{Root: "/"}).Installed(dataDir, self) {
		s.File = self
	}
	return s, err
}

// upgradeOf returns the upgrade of this machine's node, without its executable.
func (c *call) upgradeOf() (in appliance.Upgrade, m appliance.Machine, err error) {
	u := upgradeSettings
	if in, m, err = c.nodeHere(); err != nil {
		return in, m, err
	}
	in.Observe, in.Patience = u.observe.In(c.values), u.wait.In(c.values)
	if in.Observe < 0 {
		return in, m, errorkind.BadSetting(u.observe.Name, " %s is negative; give a time such as 30s", in.Observe)
	}
	if in.Patience <= 0 {
		return in, m, errorkind.BadSetting(u.wait.Name, " %s is too short; give a time such as 2m", in.Patience)
	}
	return in, m, nil
}

// nodeHere returns the part of an upgrade that describes this machine's node.
func (c *call) nodeHere() (in appliance.Upgrade, m appliance.Machine, err error) {
	v := c.values
	m = appliance.Machine{Root: "/", Manager: appliance.FindManager(), Say: func(text string) { fmt.Fprintln(c.errOut, "kedge:", text) }}
	in = appliance.Upgrade{Kubeconfig: settings.Kubeconfig.In(v), HasNode: !settings.DisableAgent.In(v)}
	if settings.Witness.In(v) {
		in.Kubeconfig, in.HasNode = "", false
	}
	for path, text := range map[*string]string{&in.Config: settings.Config.In(v), &in.DataDir: settings.DataDir.In(v), &in.RunDir: settings.RunDir.In(v)} {
		if *path, err = filepath.Abs(text); err != nil {
			return in, m, err
		}
	}
	if in.Role, err = m.RoleOf(in.DataDir); err != nil {
		return in, m, err
	}
	if in.Role == "agent" {
		in.Kubeconfig, in.HasNode = "", true
	}
	return in, m, nil
}

// runUpgrade checks and begins an upgrade, and shows it to its end.
func (c *call) runUpgrade(machine appliance.Machine, in appliance.Upgrade, noWait bool) error {
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	staged, err := machine.Stage(ctx, in)
	if err != nil && ctx.Err() != nil {
		return errors.New("the upgrade was interrupted before it began; the node is as it was")
	}
	if err != nil {
		return err
	}
	for _, note := range staged.Notes {
		fmt.Fprintln(c.errOut, "kedge:", note)
	}
	fmt.Fprintf(c.errOut, "kedge: upgrading %s to %s (Kubernetes %s)\n", staged.From, staged.To, staged.To.Kubernetes)
	if err := staged.Begin(ctx); err != nil {
		return errors.Join(err, staged.Discard())
	}
	begun, err := machine.Follow(in.DataDir)
	if err != nil {
		return err
	}
	if machine.Manager.Name() == "" && upgradeSettings.all.In(c.values) {
		return c.endAndFollow(ctx, in.RunDir, begun)
	}
	if machine.Manager.Name() == "" {
		fmt.Fprintln(c.out, "The new version is ready. This machine has neither systemd nor OpenRC: stop kedge and start it again, and the new version is tried.\n\"kedge upgrade status\" shows the result.")
		return nil
	}
	if err := begun.Restart(ctx); err != nil {
		return err
	}
	if noWait {
		return nil
	}
	return c.followUpgrade(begun)
}

// followUpgrade shows an upgrade to its end.
func (c *call) followUpgrade(begun *appliance.Begun) error {
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	o, err := begun.Wait(ctx, func(text string) { fmt.Fprintln(c.errOut, "kedge:", text) })
	if err != nil {
		return err
	}
	if o.Result == appliance.WentBack {
		return fmt.Errorf("the upgrade to %s was undone, and %s runs again: %s", o.To, o.From, o.Reason)
	}
	fmt.Fprintf(c.out, "upgraded to %s\n", o.To)
	return nil
}

// rollback goes back to the version of before.
func (p *Program) rollback(c *call) error {
	if err := needRoot("go back to another version of kedge"); err != nil {
		return err
	}
	in, machine, err := c.upgradeOf()
	if err != nil {
		return err
	}
	noWait := upgradeSettings.noWait.In(c.values)
	begun, err := machine.Follow(in.DataDir)
	if err == nil {
		if err := machine.EndTrial(in.DataDir, "the administrator has asked for it"); err != nil {
			return err
		}
		if machine.Manager.Name() == "" {
			fmt.Fprintln(c.out, "The version of before is tried when kedge is started again: stop kedge and start it.")
			return nil
		}
		if err := begun.Restart(c.ctx); err != nil || noWait {
			return err
		}
		err := c.followUpgrade(begun)
		if o, found := machine.LastUpgrade(in.DataDir); found && o.Result == appliance.WentBack {
			fmt.Fprintf(c.out, "%s runs again\n", o.From)
			return nil
		}
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	in.File, in.Rollback = filepath.Join(in.DataDir, "previous", "kedge"), true
	if _, err := os.Stat(in.File); errors.Is(err, fs.ErrNotExist) {
		return errorkind.Permanent(fmt.Errorf("%w on this node: %s does not exist", appliance.ErrNoUpgrade, in.File))
	}
	return c.runUpgrade(machine, in, noWait)
}

// watchUpgrade is the process that the launcher starts during a trial.
func watchUpgrade(c *call) error {
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE) // of the terminal or the log of the service
	dataDir, err := filepath.Abs(settings.DataDir.In(c.values))
	if err != nil {
		return err
	}
	return appliance.Machine{Root: "/", Manager: appliance.FindManager(), Say: func(string) {}}.Watch(ctx, dataDir)
}

// upgrades reads what is known of the node's upgrades.
func (c *call) upgrades() (appliance.UpgradeStatus, error) {
	if err := needRoot("see the upgrades of kedge"); err != nil {
		return appliance.UpgradeStatus{}, err
	}
	dataDir, err := filepath.Abs(settings.DataDir.In(c.values))
	if err != nil {
		return appliance.UpgradeStatus{}, err
	}
	m := appliance.Machine{Root: "/"}
	if _, err := m.RoleOf(dataDir); err != nil { // not "there is none" for a folder that is mistyped
		return appliance.UpgradeStatus{}, err
	}
	return m.Upgrades(dataDir)
}

func (c *call) upgradeStatus(asJSON bool) error {
	s, err := c.upgrades()
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(s)
	}
	switch t := s.Trial; {
	case t == nil:
		fmt.Fprintln(c.out, "No upgrade is on trial.")
	case t.Verdict == "" && t.Starts == 0:
		fmt.Fprintf(c.out, "The upgrade from %s to %s has begun at %s: the next start of kedge tries the new version.\n", t.From, t.To, t.Begin.Format(time.RFC3339))
	case t.Verdict == "":
		fmt.Fprintf(c.out, "The upgrade from %s to %s is on trial since %s: start %d of at most %d.\n", t.From, t.To, t.Begin.Format(time.RFC3339), t.Starts, t.MaxStarts)
	case t.Verdict == string(appliance.WentBack):
		fmt.Fprintf(c.out, "The upgrade from %s to %s is being undone: %s.\n", t.From, t.To, t.Reason)
	default:
		fmt.Fprintf(c.out, "The upgrade from %s to %s has succeeded, and is being completed.\n", t.From, t.To)
	}
	if n := len(s.History); n > 0 {
		o := s.History[n-1]
		fmt.Fprintf(c.out, "The last upgrade, from %s to %s, ended at %s: %s.\n", o.From, o.To, o.End.Format(time.RFC3339), withReason(o))
	}
	return nil
}

func withReason(o appliance.Outcome) string {
	if o.Reason == "" {
		return string(o.Result)
	}
	return string(o.Result) + ", because " + o.Reason
}

func (c *call) listUpgrades(asJSON bool) error {
	s, err := c.upgrades()
	if err != nil {
		return err
	}
	if asJSON {
		return c.printJSON(s.History)
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "BEGIN\tFROM\tTO\tRESULT\tREASON")
	for _, o := range slices.Backward(s.History) {
		reason := o.Reason
		if reason == "" {
			reason = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", o.Begin.Format(time.RFC3339), o.From, o.To, o.Result, reason)
	}
	return t.Flush()
}
