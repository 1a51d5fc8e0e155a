package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/appliance/remote"
	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/settings"
)

// upgradeAll upgrades all nodes of the cluster from this server.
func (p *Program) upgradeAll(c *call, source appliance.Source, in appliance.Upgrade, machine appliance.Machine) error {
	u := upgradeSettings
	if in.Role != "server" {
		return errorkind.Permanent(errors.New("this machine is an agent; run \"kedge upgrade --all\" on a server"))
	}
	if u.parallel.In(c.values) < 1 {
		return errorkind.BadSetting(u.parallel.Name, " must be at least 1")
	}
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	r, err := control.GetReport(ctx, in.RunDir)
	if err != nil {
		return err
	}
	targets, bare, err := c.clusterNodes(ctx, in)
	if err != nil {
		return err
	}
	if len(bare) > 0 {
		return errorkind.Permanent(fmt.Errorf("server %s has no node (--%s), so it cannot be upgraded from here; run \"kedge upgrade\" on each machine", bare[0], settings.DisableAgent.Name))
	}
	dir, err := os.MkdirTemp("", "kedge-upgrade-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	files, err := c.filesFor(ctx, source, targets, dir)
	if err != nil {
		return err
	}
	var mu sync.Mutex // agents are upgraded in parallel
	rollout := remote.Rollout{
		Own: r.Node, Targets: targets, Files: files, Parallel: u.parallel.In(c.values),
		Begin: remote.Begin{Observe: in.Observe, Wait: in.Patience},
		OwnInstalled: func() (string, error) {
			path, err := machine.Program(in.DataDir)
			if errors.Is(err, appliance.ErrNoJournal) {
				path, err = appliance.LauncherOf(r.PID, in.DataDir)
			}
			if err != nil {
				return "", err
			}
			return appliance.HashFile(path)
		},
		UpgradeOwn: func(context.Context) error {
			own := in
			own.File = filepath.Join(files[ownArch(targets, r.Node)].Dir, release.Executable(ownArch(targets, r.Node)))
			return c.runUpgrade(machine, own, false)
		},
		Dial: func(ctx context.Context, node string) (net.Conn, error) {
			return control.Connect(ctx, in.RunDir, control.ConnectNodePath, url.Values{"name": {node}})
		},
		Say: func(text string) {
			mu.Lock()
			defer mu.Unlock()
			fmt.Fprintln(c.errOut, "kedge:", text)
		},
	}
	if u.drain.In(c.values) {
		d := drains{kubectl: func(ctx context.Context, args ...string) error { return p.runKubectl(ctx, in.Kubeconfig, args...) }, targets: targets}
		rollout.Before, rollout.After = d.drain, d.uncordon
	}
	results, err := rollout.Run(ctx)
	if err := errors.Join(err, c.printRollout(results)); err != nil {
		return fmt.Errorf("%w\nThe same command goes on from there when the cause is corrected", err)
	}
	return nil
}

// drains evicts the pods of nodes before their upgrades, and lets pods run there again.
type drains struct {
	kubectl func(ctx context.Context, args ...string) error
	targets []remote.Target
}

func (d drains) drain(ctx context.Context, node string) error {
	return d.kubectl(ctx, "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=10m")
}

func (d drains) uncordon(ctx context.Context, node string) error {
	if slices.ContainsFunc(d.targets, func(t remote.Target) bool { return t.Name == node && t.Cordoned }) {
		return nil
	}
	return d.kubectl(ctx, "uncordon", node)
}

// printRollout prints what was done with each node.
func (c *call) printRollout(results []remote.Result) error {
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tRESULT\tREASON")
	for _, r := range results {
		if r.Reason == "" {
			r.Reason = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", r.Node, r.Outcome, r.Reason)
	}
	return t.Flush()
}

func ownArch(targets []remote.Target, node string) string {
	i := slices.IndexFunc(targets, func(t remote.Target) bool { return t.Name == node })
	if i < 0 {
		return ""
	}
	return targets[i].Arch
}

// listTimeout is the time limit for the lists of servers and nodes.
const listTimeout = 30 * time.Second

// clusterNodes returns the nodes of the cluster, and the names of servers without a node, which have no tunnel.
func (c *call) clusterNodes(ctx context.Context, in appliance.Upgrade) (targets []remote.Target, bare []string, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, listTimeout, fmt.Errorf("the cluster has not listed its nodes within %s", listTimeout))
	defer cancel()
	var servers []control.ListedServer
	if err := control.Get(ctx, in.RunDir, control.ServersPath, nil, &servers); err != nil {
		return nil, nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", in.Kubeconfig)
	if err != nil {
		return nil, nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, nil, err
	}
	nodes, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, err
	}
	var names []string
	for _, s := range servers {
		names = append(names, s.Name)
	}
	targets, bare = remote.Targets(nodes.Items, names)
	return targets, bare, nil
}

// filesFor takes the executables for the architectures of the nodes.
func (c *call) filesFor(ctx context.Context, source appliance.Source, targets []remote.Target, dir string) (map[string]remote.Files, error) {
	if source.File != "" {
		if err := refuseBundle(source.File); err != nil {
			return nil, err
		}
	}
	files, note, err := remote.Take(ctx, source, targets, dir)
	if note != "" && err == nil {
		fmt.Fprintln(c.errOut, "kedge:", note)
	}
	return files, err
}

// runKubectl runs kubectl, whose output is shown.
func (p *Program) runKubectl(ctx context.Context, kubeconfig string, args ...string) error {
	self, err := p.executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{"kubectl", "--kubeconfig=" + kubeconfig}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("kubectl %s: %w", args[0], err)
	}
	return nil
}

// endAndFollow ends kedge on a machine without a service manager, where whatever has started it starts it again, and follows
// the upgrade.
func (c *call) endAndFollow(ctx context.Context, runDir string, begun *appliance.Begun) error {
	r, err := control.GetReport(ctx, runDir)
	if err == nil {
		err = syscall.Kill(r.PID, syscall.SIGTERM)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(c.errOut, "kedge: kedge ends, and what has started it must start it again")
	return c.followUpgrade(begun)
}
