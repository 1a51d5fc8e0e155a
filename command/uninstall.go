package command

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"kedge/appliance"
	"kedge/internal/errorkind"
	"kedge/settings"
	"kedge/throwaway/kubeconfig"
)

// uninstallSettings are the settings of "kedge uninstall" itself.
var uninstallSettings = struct{ purge, dryRun settings.Of[bool] }{
	purge: settings.Switch(settings.Setting{Name: "purge", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Remove the cluster's data, the images, the pods' volumes and the configuration too"}),
	dryRun: settings.Switch(settings.Setting{Name: "dry-run", Category: settings.Installation, NoVar: true, NoKey: true,
		Help: "Show what would be removed, and change nothing"}),
}

func (p *Program) uninstallCommand() *cli.Command {
	u := uninstallSettings
	return leaf(cli.Command{
		Name:  "uninstall",
		Usage: "Remove what \"kedge install\" has made, and kill the node's containers",
		Description: "The service, the executable, links and completion are removed. The data and the configuration stay unless\n" +
			"--purge is given. Files that were changed since the installation stay, and are named. Mount points are never\n" +
			"entered. The command can be run again after it was interrupted.",
	}, append(settings.For(settings.Server), rowsOf(u.purge, u.dryRun)...), p.uninstall)
}

func (p *Program) uninstall(c *call) error {
	if err := needRoot("uninstall kedge"); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	dataDir, err := filepath.Abs(settings.DataDir.In(c.values))
	if err != nil {
		return err
	}
	u := appliance.Uninstall{
		DataDir: dataDir, Purge: uninstallSettings.purge.In(c.values), DropContext: kubeconfig.Drop, LinkPrefixes: p.LinkPrefixes,
		// The token is of no use here, and its file may be gone.
		KillAll: func(ctx context.Context) error { return p.KillAll(ctx, Node{Values: c.values}) },
	}
	machine := appliance.Machine{Root: "/", Manager: appliance.FindManager(), Say: func(text string) { fmt.Fprintln(c.errOut, "kedge:", text) }}
	removal, err := machine.PlanRemoval(u)
	if errors.Is(err, appliance.ErrNoJournal) {
		return errorkind.Permanent(fmt.Errorf("%w; give the data directory of another installation with --data-dir, or kill the containers of a kedge without installation with \"kedge killall\"", err))
	}
	if err != nil {
		return err
	}
	for _, note := range removal.Notes {
		fmt.Fprintln(c.errOut, "kedge:", note)
	}
	if uninstallSettings.dryRun.In(c.values) {
		fmt.Fprint(c.out, removal)
		return nil
	}
	if err := removal.Apply(ctx); err != nil {
		return fmt.Errorf("%w\nThe removal is not complete; run the command again after correcting the cause", err)
	}
	left, notes, err := removal.Leftovers()
	if err != nil {
		return err
	}
	for _, note := range notes {
		fmt.Fprintln(c.errOut, "kedge:", note)
	}
	if len(left) > 0 {
		return fmt.Errorf("kedge is removed, and this is left:\n  %s", strings.Join(left, "\n  "))
	}
	fmt.Fprintln(c.out, "kedge is removed")
	return nil
}
