package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/errorkind"
	"kedge/preflight"
	"kedge/settings"
	"kedge/throwaway"
	"kedge/throwaway/machine"
)

const defaultCluster = "kedge"

// The settings that several commands on throwaway clusters have.
var (
	clusters = settings.NotEmpty(settings.Setting{Name: "clusters", Category: settings.Throwaway, Default: "/var/lib/kedge-clusters",
		Help: "`DIR` of throwaway clusters"})
	clusterName = settings.Text(settings.Setting{Name: "name", Category: settings.Throwaway, Default: defaultCluster, Help: "`NAME` of the cluster"})
	waitLimit   = settings.Duration(settings.Setting{Name: "wait", Category: settings.Throwaway, Default: "2m0s", NoVar: true, Help: "`TIME` to wait until the cluster is ready"})
)

// upSettings are the settings of "kedge up" only.
var upSettings = struct {
	config               settings.Of[string]
	servers, agents      settings.Of[int]
	images, manifests    settings.Of[[]string]
	ports                settings.Of[[]machine.Port]
	dualStack, ephemeral settings.Of[bool]
	kubeconfig           settings.Of[string]
}{
	config:     settings.Text(settings.Setting{Name: "config", Category: settings.Throwaway, NoVar: true, NoKey: true, Help: "`FILE` with these settings in YAML; flags take precedence"}),
	servers:    settings.Number(settings.Setting{Name: "servers", Category: settings.Throwaway, Default: "1", NoVar: true, Help: "`NUMBER` of servers"}),
	agents:     settings.Number(settings.Setting{Name: "agents", Category: settings.Throwaway, Default: "0", NoVar: true, Help: "`NUMBER` of agents"}),
	images:     settings.Verbatim(settings.Setting{Name: "image", Category: settings.Throwaway, NoVar: true, Help: "`ARCHIVE` with images for every node (can be repeated)"}),
	manifests:  settings.Verbatim(settings.Setting{Name: "manifest", Category: settings.Throwaway, NoVar: true, Help: "`PATH` of a file or folder to apply (can be repeated)"}),
	ports:      settings.List(settings.Setting{Name: "port", Category: settings.Throwaway, NoVar: true, Help: "`[ADDRESS:]PORT:NODEPORT`: forward a port of this machine, by default on 127.0.0.1, to a node port (can be repeated)"}, parsePort),
	dualStack:  settings.Switch(settings.Setting{Name: "dual-stack", Category: settings.Throwaway, NoVar: true, Help: "Give nodes, pods and services addresses of both families"}),
	kubeconfig: settings.Text(settings.Setting{Name: "kubeconfig", Category: settings.Throwaway, NoVar: true, Help: "`FILE` to add the context kedge-NAME to (default: that of kubectl)"}),
	ephemeral:  settings.Switch(settings.Setting{Name: "ephemeral", Category: settings.Throwaway, NoVar: true, Help: "Run the command after -- with KUBECONFIG set, and remove the cluster when it ends"}),
}

func (p *Program) upCommand() *cli.Command {
	u := upSettings
	return leaf(cli.Command{
		Name:      "up",
		Usage:     "Create a throwaway cluster on this machine",
		ArgsUsage: "[-- COMMAND ARGUMENTS]",
		Description: "Each node is a kedge on a machine of its own, with processes, files, network and control group that\n" +
			"are isolated from this host. The command returns when all nodes are Ready, DNS answers, and every\n" +
			"manifest's objects are available. \"kedge down\" removes everything.",
	}, rowsOf(u.config, clusterName, clusters, waitLimit, u.servers, u.agents, u.images, u.manifests, u.ports, u.dualStack, u.kubeconfig, u.ephemeral), p.up)
}

func (p *Program) up(c *call) error {
	cfg, err := p.upConfig(c)
	if err != nil {
		return errorkind.BadUsage(err)
	}
	root, err := c.clusters("make a throwaway cluster")
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := throwawayPossible(ctx); err != nil {
		return err
	}
	begin := time.Now()
	cluster, err := root.Create(ctx, cfg, func(text string) { fmt.Fprintln(c.errOut, "kedge:", text) })
	if err != nil {
		return err
	}
	if !cfg.Ephemeral {
		fmt.Fprintf(c.errOut, "kedge: cluster %s is ready after %s\n", cfg.Name, time.Since(begin).Round(10*time.Millisecond))
		fmt.Fprintf(c.out, "kubectl --context %s get nodes\n", cluster.Context())
		return cluster.Close()
	}
	code, err := runWith(ctx, c.command(), cluster.Kubeconfig())
	err = errors.Join(err, cluster.Close())
	if err == nil && code != 0 {
		return exitCode(code)
	}
	return err
}

// upConfig composes the configuration of "kedge up" and reports all its errors.
func (p *Program) upConfig(c *call) (throwaway.Config, error) {
	u, v := upSettings, c.values
	cfg := throwaway.Config{
		Name: clusterName.In(v), Servers: u.servers.In(v), Agents: u.agents.In(v), Images: u.images.In(v), Manifests: u.manifests.In(v), Ports: u.ports.In(v),
		Wait: waitLimit.In(v), Ephemeral: u.ephemeral.In(v), DualStack: u.dualStack.In(v), Version: p.Version, Kubeconfig: u.kubeconfig.In(v),
	}
	var errs []error
	var err error
	if cfg.Program, err = p.executable(); err != nil {
		errs = append(errs, err)
	}
	switch {
	case cfg.Ephemeral && len(c.args) == 0:
		errs = append(errs, errorkind.BadSetting(u.ephemeral.Name, ": give the command to run after --"))
	case !cfg.Ephemeral && len(c.args) > 0:
		errs = append(errs, badUsage("\"kedge up\" takes flags only, not %q; a command is for --ephemeral", c.args[0]))
	case cfg.Kubeconfig == "" && !cfg.Ephemeral:
		if cfg.Kubeconfig, err = userKubeconfig(); err != nil {
			errs = append(errs, err)
		}
	}
	if cfg.Kubeconfig != "" {
		if cfg.Kubeconfig, err = filepath.Abs(cfg.Kubeconfig); err != nil {
			errs = append(errs, err)
		}
	}
	if err := cfg.Validate(); err != nil {
		errs = append(errs, err)
	}
	return cfg, errors.Join(errs...)
}

// command returns the command after --.
func (c *call) command() []string {
	if len(c.args) > 0 && c.args[0] == "--" {
		return c.args[1:]
	}
	return c.args
}

// executable returns the file that the user has started.
func (p *Program) executable() (string, error) {
	if p.Launcher != "" {
		return p.Launcher, nil
	}
	return os.Executable()
}

// userKubeconfig returns the file that kubectl writes to.
func userKubeconfig() (string, error) {
	if list := filepath.SplitList(os.Getenv("KUBECONFIG")); len(list) > 0 {
		return list[0], nil
	}
	home, err := os.UserHomeDir()
	return filepath.Join(home, ".kube", "config"), err
}

// parsePort parses [ADDRESS:]PORT:NODEPORT.
func parsePort(text string) (machine.Port, error) {
	bad := fmt.Errorf(" %q is not [ADDRESS:]PORT:NODEPORT", text)
	address := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	rest := text
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		if j := strings.LastIndexByte(text[:i], ':'); j >= 0 {
			a, err := netip.ParseAddr(strings.Trim(text[:j], "[]"))
			if err != nil {
				return machine.Port{}, bad
			}
			address, rest = a, text[j+1:]
		}
	}
	host, node, found := strings.Cut(rest, ":")
	from, err1 := strconv.ParseUint(host, 10, 16)
	to, err2 := strconv.ParseUint(node, 10, 16)
	if !found || err1 != nil || err2 != nil || from == 0 || to == 0 {
		return machine.Port{}, bad
	}
	return machine.Port{Listen: netip.AddrPortFrom(address, uint16(from)), To: int(to)}, nil
}

// clusters returns the directory of throwaway clusters, after removing leftovers of earlier commands.
func (c *call) clusters(does string) (throwaway.Root, error) {
	if err := needRoot(does); err != nil {
		return "", err
	}
	dir, err := filepath.Abs(clusters.In(c.values))
	if err != nil {
		return "", err
	}
	root := throwaway.Root(dir)
	return root, root.Sweep()
}

// throwawayPossible returns an error if this machine cannot run throwaway clusters.
func throwawayPossible(ctx context.Context) error {
	results, err := preflight.Required(ctx, preflight.DefaultConfig())
	if err == nil {
		return nil
	}
	// Findings about ports, routes and folders do not apply, because the clusters' machines have their own. The
	// first finding is the cause of most others.
	for _, r := range results {
		if r.Level == preflight.Error && slices.Contains([]string{"privileges", "namespaces", "cgroups", "links", "nftables"}, r.Check) {
			return fmt.Errorf("this machine cannot run throwaway clusters: %s; %s", r.Message, r.Remedy)
		}
	}
	return nil
}

// runWith runs the user's command with a kubeconfig and returns its exit code, in the way of a shell.
func runWith(ctx context.Context, command []string, kubeconfig string) (int, error) {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig)
	// A signal to kedge is passed on. A signal of the terminal reaches the command directly.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode(), nil
	case exit != nil:
		return 128 + int(exit.Sys().(syscall.WaitStatus).Signal()), nil
	case err != nil && ctx.Err() != nil:
		return 130, nil
	case err != nil:
		return 0, fmt.Errorf("run the command: %w", err)
	}
	return 0, nil
}

func (p *Program) downCommand() *cli.Command {
	all := settings.Switch(settings.Setting{Name: "all", Category: settings.Throwaway, NoVar: true, Help: "All clusters, and the templates"})
	return leaf(cli.Command{Name: "down", Usage: "Remove throwaway clusters", ArgsUsage: "[NAME...]"}, rowsOf(clusters, all), func(c *call) error {
		root, err := c.clusters("remove throwaway clusters")
		if err != nil {
			return err
		}
		names := c.args
		if all.In(c.values) {
			if len(names) > 0 {
				return badUsage("give names of clusters or --all, not both")
			}
			listed, err := root.List()
			if err != nil {
				return err
			}
			for _, cluster := range listed {
				names = append(names, cluster.Name())
			}
		} else if len(names) == 0 {
			names = []string{defaultCluster}
		}
		var errs []error
		for _, name := range names {
			errs = append(errs, root.Remove(name))
		}
		if all.In(c.values) {
			errs = append(errs, root.RemoveTemplates())
		}
		return errors.Join(errs...)
	})
}

func (p *Program) lsCommand() *cli.Command {
	return leaf(cli.Command{Name: "ls", Usage: "List throwaway clusters and their nodes"}, rowsOf(clusters), func(c *call) error {
		root, err := c.clusters("see throwaway clusters")
		if err != nil {
			return err
		}
		all, err := root.List()
		if err != nil {
			return err
		}
		t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "CLUSTER\tNODE\tADDRESS\tSTATE\tAGE")
		for _, listed := range all {
			if err := listNodes(t, root, listed); err != nil {
				return err
			}
		}
		return t.Flush()
	})
}

func listNodes(w io.Writer, root throwaway.Root, listed *throwaway.Cluster) error {
	cluster, err := root.Open(listed.Name())
	if err != nil {
		return err
	}
	defer cluster.Close()
	for _, m := range cluster.Site().Machines() {
		state := "off"
		if st, err := m.Kedge(); err == nil && st.Running {
			state = "running"
		} else if err == nil {
			state = "kedge exited: " + st.Ended
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", cluster.Name(), m.Name(), m.Addrs()[0].Addr(), state, time.Since(cluster.Created()).Round(time.Second))
	}
	return nil
}

func (p *Program) logsCommand() *cli.Command {
	return leaf(cli.Command{Name: "logs", Usage: "Print the logs of the nodes of a throwaway cluster", ArgsUsage: "[NODE...]"}, rowsOf(clusterName, clusters), func(c *call) error {
		return c.withCluster(func(cluster *throwaway.Cluster) error {
			nodes := cluster.Site().Machines()
			if len(c.args) > 0 {
				nodes = nil
				for _, name := range c.args {
					m, err := cluster.Node(name)
					if err != nil {
						return err
					}
					nodes = append(nodes, m)
				}
			}
			for _, m := range nodes {
				log, err := os.Open(m.Log())
				if err != nil {
					return err
				}
				if len(nodes) > 1 {
					fmt.Fprintf(c.out, "==> %s <==\n", m.Name())
				}
				_, err = io.Copy(c.out, log)
				log.Close()
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// withCluster calls f with the cluster of --name.
func (c *call) withCluster(f func(*throwaway.Cluster) error) error {
	root, err := c.clusters("use a throwaway cluster")
	if err != nil {
		return err
	}
	cluster, err := root.Open(clusterName.In(c.values))
	if err != nil {
		return err
	}
	return errors.Join(f(cluster), cluster.Close())
}
