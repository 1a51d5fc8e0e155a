package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"kedge/appliance"
	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/preflight"
	"kedge/settings"
	"kedge/throwaway/kubeconfig"
)

// installSettings are the settings of "kedge install" itself.
var installSettings = struct {
	binDir, links      settings.Of[string]
	bundle             settings.Of[string]
	force, dryRun      settings.Of[bool]
	kubeconfig, noWait settings.Of[bool]
	wait               settings.Of[time.Duration]
}{
	binDir: settings.NotEmpty(settings.Setting{Name: "bin-dir", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "`DIR` for the executable (default: /usr/local/bin, or /opt/bin where that is read-only)"}),
	links: settings.OneOf(settings.Setting{Name: "links", Category: settings.Installation, Default: string(appliance.LinksAuto), NoVar: true, NoKey: true,
		Help: "`MODE` of the links kubectl and ctr: auto (unless there is such a command), skip, or force (replace other links)"},
		[]string{string(appliance.LinksAuto), string(appliance.LinksSkip), string(appliance.LinksForce)}),
	bundle: settings.Text(settings.Setting{Name: "bundle", Category: settings.Installation, NoKey: true,
		Help: "`FILE` of \"kedge bundle create\" to install from (default: the executable itself, if it is a bundle)"}),
	force: settings.Switch(settings.Setting{Name: "force", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Replace files that \"kedge install\" did not write"}),
	dryRun: settings.Switch(settings.Setting{Name: "dry-run", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Show what would be done, and change nothing"}),
	kubeconfig: settings.Switch(settings.Setting{Name: "kubeconfig", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Add the cluster to the kubeconfig of the user who called sudo"}),
	noWait: settings.Switch(settings.Setting{Name: "no-wait", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Do not wait until the node is ready"}),
	wait: settings.Duration(settings.Setting{Name: "wait", Category: settings.Installation, Default: "2m0s", NoVar: true, NoKey: true,
		Help: "`TIME` without progress after which the command stops to wait until the node is ready"}),
}

func (p *Program) installCommand() *cli.Command {
	role := func(name, usage string, role settings.Role, own ...interface{ Row() *settings.Setting }) *cli.Command {
		return creatingLeaf(cli.Command{Name: name, Usage: usage}, append(settings.For(role), rowsOf(own...)...), p.bundleDefaults, sameRole(name), func(c *call) error {
			return p.install(c, role, name)
		})
	}
	i := installSettings
	return &cli.Command{
		Name:  "install",
		Usage: "Install kedge as a service of this machine, or change the installation",
		Description: "The executable, links, completion and a service are put into their places, and the given settings into\n" +
			"the configuration file, where they stay: another \"kedge install\" changes only what is given then.\n" +
			"The command needs no network, and returns when the node is ready. \"kedge uninstall\" removes it all.",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			role("server", "Install a server; accepts all settings of \"kedge server\"", settings.Server, i.bundle, i.binDir, i.links, i.force, i.dryRun, i.kubeconfig, i.noWait, i.wait, upgradeSettings.observe),
			role("agent", "Install an agent; accepts all settings of \"kedge agent\"", settings.Agent, i.bundle, i.binDir, i.links, i.force, i.dryRun, i.noWait, i.wait, upgradeSettings.observe),
		},
	}
}

// sameRole returns a function that refuses the role for an installation of the other: its configuration file has settings that
// the role does not have, of which errors would be misleading.
func sameRole(role string) func(settings.Values) error {
	return func(v settings.Values) error {
		dataDir, err := filepath.Abs(settings.DataDir.In(v))
		if err != nil || os.Geteuid() != 0 {
			return err
		}
		return appliance.Machine{Root: "/"}.SameRole(dataDir, role)
	}
}

// install installs a role.
func (p *Program) install(c *call, role settings.Role, name string) (err error) {
	if err := needRoot("install kedge"); err != nil {
		return err
	}
	n, err := p.node(c)
	if err != nil {
		return err
	}
	n.Role = role
	in, err := p.installation(c, n, name)
	if err != nil {
		return err
	}
	contents, err := p.openInstalled(c, role, &in)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, contents.close()) }()
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	machine := appliance.Machine{Root: "/", Manager: appliance.FindManager(), Say: func(text string) { fmt.Fprintln(c.errOut, "kedge:", text) }}
	if err := c.upgradeFirst(ctx, machine, in, n, contents); err != nil {
		return err
	}
	planned, err := machine.Plan(ctx, in)
	if err != nil {
		return err
	}
	if err := c.sameAfterwards(in, planned); err != nil {
		return err
	}
	if err := p.checkBefore(ctx, c, n); err != nil {
		return err
	}
	for _, note := range planned.Notes {
		fmt.Fprintln(c.errOut, "kedge:", note)
	}
	if installSettings.dryRun.In(c.values) {
		what, err := contents.describe(ctx, in)
		if err != nil {
			return err
		}
		if !planned.Changes() && in.Contents == nil {
			fmt.Fprintln(c.out, "nothing to change")
		}
		fmt.Fprint(c.out, what, planned)
		return nil
	}
	if err := contents.stage(ctx, c, in); err != nil {
		return err
	}
	before := 0
	if r, err := control.GetReport(ctx, in.RunDir); err == nil && planned.Restarts() {
		before = r.PID
	}
	if err := planned.Apply(ctx); err != nil {
		return err
	}
	// Of an agent that has joined since an earlier run.
	if err := planned.DropToken(); err != nil {
		return err
	}
	if machine.Manager.Name() == "" {
		fmt.Fprintf(c.out, "kedge is installed. This machine has neither systemd nor OpenRC; start at boot, as root:\n  %s\n", planned.Command())
		if in.Token != "" && in.Joins {
			fmt.Fprintf(c.out, "Run \"kedge install %s\" again when the node has joined: it removes the token from the disk.\n", in.Role)
		}
		return nil
	}
	if installSettings.noWait.In(c.values) {
		return nil
	}
	if err := c.waitReady(ctx, machine.Manager, in, before); err != nil {
		return err
	}
	return c.finish(planned, in)
}

// upgradeFirst upgrades a node that is installed with another executable, before the settings are changed: the version that
// may come back does not know new settings.
func (c *call) upgradeFirst(ctx context.Context, machine appliance.Machine, in appliance.Install, n Node, contents *installedBundle) error {
	if !machine.IsUpgrade(in) {
		return nil
	}
	if installSettings.dryRun.In(c.values) {
		fmt.Fprintf(c.out, "upgrade kedge to %s, and go back by itself if that is not healthy\n", in.Program)
		return nil
	}
	if err := contents.stage(ctx, c, in); err != nil { // a damaged bundle upgrades nothing
		return err
	}
	u, _, err := c.upgradeOf()
	if err != nil {
		return err
	}
	u.File, u.FileAt, u.FileSize, u.Patience = in.Program, in.ProgramAt, in.ProgramSize, installSettings.wait.In(c.values)
	u.HasNode = n.Role == settings.Agent || !(settings.DisableAgent.In(c.values) || settings.Witness.In(c.values))
	return c.runUpgrade(machine, u, false)
}

// installation returns the installation that the user wants.
func (p *Program) installation(c *call, n Node, name string) (appliance.Install, error) {
	v := c.values
	in := appliance.Install{
		Role: name, Version: p.Version, Token: n.Token, Joins: name == "agent" || settings.JoinServer.In(v) != "",
		BinDir: installSettings.binDir.In(v), Links: appliance.LinkMode(installSettings.links.In(v)), Force: installSettings.force.In(v),
		Environ: os.Environ(), Completions: completions,
	}
	in.Witness = name == "server" && settings.Witness.In(v)
	if name == "server" && !in.Witness {
		in.Kubeconfig = settings.Kubeconfig.In(v)
	}
	var errs []error
	var err error
	if in.Program, err = p.executable(); err != nil {
		errs = append(errs, err)
	}
	for path, text := range map[*string]string{&in.Config: settings.Config.In(v), &in.DataDir: settings.DataDir.In(v), &in.RunDir: settings.RunDir.In(v)} {
		if *path, err = filepath.Abs(text); err != nil {
			errs = append(errs, err)
		}
	}
	if in.Config == os.DevNull {
		errs = append(errs, errorkind.BadSetting(settings.Config.Name, ": an installation needs a configuration file"))
	}
	given := false
	for _, made := range v.Made() {
		secret := made.Name == settings.Token.Name || made.Name == settings.TokenFile.Name && in.Joins
		given = given || secret || made.Name == settings.TokenFile.Name
		if made.NoKey || secret {
			continue
		}
		if slices.Contains(pathSettings(), made.Name) && made.Items[0] != "" {
			abs, err := filepath.Abs(made.Items[len(made.Items)-1])
			errs = append(errs, err)
			made.Items = []string{abs}
		}
		in.Settings = append(in.Settings, appliance.Setting{Key: made.Name, Values: made.Items, List: made.List})
	}
	if !given || !in.Joins && !settings.Token.IsSet(v) { // the token is where it was
		in.Token = ""
	}
	return in, errors.Join(errs...)
}

// pathSettings are the settings whose value is a path.
func pathSettings() []string {
	return []string{settings.DataDir.Name, settings.RunDir.Name, settings.PrivateRegistry.Name, settings.ResolvConf.Name, settings.Kubeconfig.Name, settings.TokenFile.Name, settings.Log.Name}
}

// sameAfterwards returns an error if the settings that are given would not be those of the service, because another
// configuration file has precedence.
func (c *call) sameAfterwards(in appliance.Install, planned *appliance.Planned) error {
	files, err := settings.ReadFiles(in.Config, false)
	if err != nil {
		return errorkind.Permanent(err)
	}
	files = slices.DeleteFunc(files, func(f settings.File) bool { return f.Name == in.Config })
	files = append([]settings.File{{Name: in.Config, Data: planned.Config()}}, files...)
	after, err := settings.Resolve(settings.For(settings.Both), settings.Sources{Files: files})
	if err != nil {
		return err
	}
	for _, s := range in.Settings {
		items, origin := after.ItemsOf(s.Key)
		if origin.File != in.Config && !slices.Equal(items, s.Values) {
			return errorkind.Permanent(fmt.Errorf("%s:%d sets %s too, with precedence over %s; change it there", origin.File, origin.Line, s.Key, in.Config))
		}
	}
	return nil
}

// checkBefore checks the settings and the machine, and prints warnings.
func (p *Program) checkBefore(ctx context.Context, c *call, n Node) error {
	results, _, err := p.Check(ctx, n)
	if err != nil {
		return err
	}
	for _, r := range results {
		if r.Level == preflight.Warning {
			fmt.Fprintf(c.errOut, "kedge: warning: %s: %s; %s\n", r.Check, r.Message, r.Remedy)
		}
	}
	return nil
}

// waitReady waits until the node is ready, and shows what it waits for.
func (c *call) waitReady(ctx context.Context, m appliance.Manager, in appliance.Install, before int) error {
	show, erase := showProgress(c.errOut)
	w := appliance.Waiter{
		Report:   func(ctx context.Context) (control.Report, error) { return control.GetReport(ctx, in.RunDir) },
		Service:  m.State,
		Node:     in.NodeReady,
		Show:     show,
		Patience: installSettings.wait.In(c.values),
		Before:   before,
		Problems: func(of []lifecycle.Status) {
			erase()
			for _, p := range of {
				fmt.Fprintf(c.errOut, "kedge: warning: %s: %s; \"kedge doctor\" says what to do\n", p.Name, p.Error)
			}
		},
	}
	if settings.DisableAgent.In(c.values) || in.Witness {
		w.Node = nil
	}
	err := w.Wait(ctx)
	erase()
	switch {
	case errors.Is(err, appliance.ErrEnded), errors.Is(err, appliance.ErrStuck):
		if words := m.LastWords(ctx); words != "" {
			err = fmt.Errorf("%w; its last error: %s", err, words)
		}
		if errors.Is(err, appliance.ErrStuck) {
			err = fmt.Errorf("%w\nThe service continues to try; \"kedge status\" and %q show more, and \"kedge install %s\" waits again", err, m.LogCommand(), in.Role)
		} else {
			err = fmt.Errorf("%w\n%q shows more; correct the cause, and run \"kedge install %s\" again", err, m.LogCommand(), in.Role)
		}
	}
	return err
}

// showProgress returns a function that shows what is waited for, in one line on a terminal, and else in a line for each
// component; and a function that removes the line.
func showProgress(out io.Writer) (show func(appliance.Progress, bool), erase func()) {
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		begin := time.Now()
		show = func(p appliance.Progress, _ bool) {
			fmt.Fprintf(out, "\r\x1b[Kkedge: %.100s (%s)", p, time.Since(begin).Round(time.Second))
		}
		return show, func() { fmt.Fprint(out, "\r\x1b[K") }
	}
	last := "none"
	show = func(p appliance.Progress, changed bool) {
		if changed && p.Component != last {
			last = p.Component
			fmt.Fprintln(out, "kedge:", p)
		}
	}
	return show, func() {}
}

// finish does what is possible only after the start, and prints what a person needs next.
func (c *call) finish(planned *appliance.Planned, in appliance.Install) error {
	if err := planned.DropToken(); err != nil {
		return err
	}
	r, err := control.GetReport(c.ctx, in.RunDir)
	if err != nil {
		return err
	}
	if in.Role == "agent" {
		fmt.Fprintf(c.out, "node %s is ready; on a server:\n  kubectl get nodes\nThe components of this node:\n  %s status\n", r.Node, planned.Program())
		return nil
	}
	if installSettings.kubeconfig.In(c.values) {
		if err := c.mergeKubeconfig(planned, in, r.Node); err != nil {
			return err
		}
	}
	fmt.Fprintf(c.out, "server %s is ready:\n  %s kubectl get nodes\nThe command that joins an agent:\n  %s token create\n", r.Node, planned.Program(), planned.Program())
	return nil
}

// mergeKubeconfig adds the cluster to the kubeconfig of the user who called the command.
func (c *call) mergeKubeconfig(planned *appliance.Planned, in appliance.Install, node string) error {
	file, err := callersKubeconfig()
	if err != nil {
		return err
	}
	name := "kedge@" + node
	if err := planned.RecordContext(file, name); err != nil {
		return err
	}
	if err := kubeconfig.Add(file, in.Kubeconfig, name); err != nil {
		return err
	}
	fmt.Fprintf(c.errOut, "kedge: context %s is in %s\n", name, file)
	return nil
}

// callersKubeconfig returns the file of kubectl for the user who called sudo, or for the user of this process.
func callersKubeconfig() (string, error) {
	name := os.Getenv("SUDO_USER")
	if name == "" || os.Getenv("KUBECONFIG") != "" {
		return userKubeconfig()
	}
	u, err := user.Lookup(name)
	if err != nil {
		return "", fmt.Errorf("find the home directory of %s: %w", name, err)
	}
	return filepath.Join(u.HomeDir, ".kube", "config"), nil
}
