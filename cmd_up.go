package main

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

	"kedge/internal/machines"
	"kedge/internal/preflight"
	"kedge/internal/throwaway"
)

const (
	catCluster     = "Cluster"
	defaultCluster = "kedge"
)

// rootFlag says where throwaway clusters are.
func rootFlag() cli.Flag {
	return &cli.StringFlag{Name: "clusters", Category: catCluster, Value: "/var/lib/kedge-clusters", EnvVars: env("clusters"),
		Usage: "`DIR` in which throwaway clusters are"}
}

func clusterNameFlag() cli.Flag {
	return &cli.StringFlag{Name: "name", Category: catCluster, Value: defaultCluster, EnvVars: env("name"), Usage: "`NAME` of the cluster"}
}

func waitFlag() cli.Flag {
	return &cli.DurationFlag{Name: "wait", Category: catCluster, Value: 2 * time.Minute, Usage: "`TIME` for all of it to be ready"}
}

func upCommand() *cli.Command {
	flags := []cli.Flag{
		&cli.StringFlag{Name: "config", Category: catCluster, Usage: "`FILE` with these settings in YAML; flags win"},
		clusterNameFlag(), rootFlag(), waitFlag(),
		&cli.IntFlag{Name: "servers", Category: catCluster, Value: 1, Usage: "`NUMBER` of servers"},
		&cli.IntFlag{Name: "agents", Category: catCluster, Usage: "`NUMBER` of agents"},
		&cli.StringSliceFlag{Name: "image", Category: catCluster, Usage: "`ARCHIVE` with images for every node (can be repeated)"},
		&cli.StringSliceFlag{Name: "manifest", Category: catCluster, Usage: "`PATH` of a file or folder to apply (can be repeated)"},
		&cli.StringSliceFlag{Name: "port", Category: catCluster, Usage: "`[ADDRESS:]PORT:NODEPORT` of this machine, by default of 127.0.0.1, that leads to a node port (can be repeated)"},
		&cli.BoolFlag{Name: "dual-stack", Category: catCluster, Usage: "Give nodes, pods and services addresses of both families"},
		&cli.StringFlag{Name: "kubeconfig", Category: catCluster, Usage: "`FILE` to add the context kedge-NAME to (default: that of kubectl)"},
		&cli.BoolFlag{Name: "ephemeral", Category: catCluster, Usage: "Run the command after -- with KUBECONFIG set, and remove the cluster when it ends"},
	}
	return &cli.Command{
		Name:      "up",
		Usage:     "Make a throwaway cluster on this machine",
		ArgsUsage: "[-- COMMAND ARGUMENTS]",
		Description: "Each node is a kedge on a machine of its own: with processes, files, network and control group that\n" +
			"nothing else on this host sees. The command returns when all nodes are Ready, DNS answers, and every\n" +
			"manifest's objects are available. \"kedge down\" removes everything.",
		Flags: flags,
		Action: func(c *cli.Context) error {
			if c.String("config") == "" {
				return up(c)
			}
			return configured(c, flags, func() error { return up(c) })
		},
	}
}

func up(c *cli.Context) error {
	cfg, err := upConfig(c)
	if err != nil {
		return err
	}
	root, err := clustersOf(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := throwawayPossible(ctx); err != nil {
		return err
	}
	begin := time.Now()
	cluster, err := root.Create(ctx, cfg, func(text string) { fmt.Fprintln(c.App.ErrWriter, "kedge:", text) })
	if err != nil {
		return err
	}
	if !cfg.Ephemeral {
		fmt.Fprintf(c.App.ErrWriter, "kedge: cluster %s is ready after %s\n", cfg.Name, time.Since(begin).Round(10*time.Millisecond))
		fmt.Fprintf(c.App.Writer, "kubectl --context %s get nodes\n", cluster.Context())
		return cluster.Close()
	}
	code, err := runWith(ctx, c.Args().Slice(), cluster.Kubeconfig())
	err = errors.Join(err, cluster.Close())
	if err == nil && code != 0 {
		return exitCode(code)
	}
	return err
}

// upConfig composes the flags of "kedge up" and says all that is wrong with them.
func upConfig(c *cli.Context) (throwaway.Config, error) {
	p := &flagParser{c: c}
	cfg := throwaway.Config{
		Name: c.String("name"), Servers: c.Int("servers"), Agents: c.Int("agents"), Images: c.StringSlice("image"), Manifests: c.StringSlice("manifest"),
		Wait: c.Duration("wait"), Ephemeral: c.Bool("ephemeral"), DualStack: c.Bool("dual-stack"), Program: ownExecutable(p), Version: version, Kubeconfig: c.String("kubeconfig"),
	}
	for _, text := range c.StringSlice("port") {
		port, err := parsePort(text)
		p.fail(err)
		cfg.Ports = append(cfg.Ports, port)
	}
	switch {
	case cfg.Ephemeral && !c.Args().Present():
		p.fail(errors.New("--ephemeral: name the command to run, after --"))
	case !cfg.Ephemeral && c.Args().Present():
		p.fail(fmt.Errorf("\"kedge up\" takes flags only, not %q; a command is for --ephemeral", c.Args().First()))
	case cfg.Kubeconfig == "" && !cfg.Ephemeral:
		cfg.Kubeconfig = userKubeconfig(p)
	}
	if cfg.Kubeconfig != "" {
		abs, err := filepath.Abs(cfg.Kubeconfig)
		p.fail(err)
		cfg.Kubeconfig = abs
	}
	p.fail(cfg.Validate())
	return cfg, p.err()
}

// ownExecutable is what the user has started.
func ownExecutable(p *flagParser) string {
	if l := launcherPath(); l != "" {
		return l
	}
	self, err := os.Executable()
	p.fail(err)
	return self
}

// userKubeconfig is the file that kubectl writes to.
func userKubeconfig(p *flagParser) string {
	if list := filepath.SplitList(os.Getenv("KUBECONFIG")); len(list) > 0 {
		return list[0]
	}
	home, err := os.UserHomeDir()
	p.fail(err)
	return filepath.Join(home, ".kube", "config")
}

func parsePort(text string) (machines.Port, error) {
	bad := fmt.Errorf("--port %q is not [ADDRESS:]PORT:NODEPORT", text)
	address := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	rest := text
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		if j := strings.LastIndexByte(text[:i], ':'); j >= 0 {
			a, err := netip.ParseAddr(strings.Trim(text[:j], "[]"))
			if err != nil {
				return machines.Port{}, bad
			}
			address, rest = a, text[j+1:]
		}
	}
	host, node, found := strings.Cut(rest, ":")
	from, err1 := strconv.ParseUint(host, 10, 16)
	to, err2 := strconv.ParseUint(node, 10, 16)
	if !found || err1 != nil || err2 != nil || from == 0 || to == 0 {
		return machines.Port{}, bad
	}
	return machines.Port{Listen: netip.AddrPortFrom(address, uint16(from)), To: int(to)}, nil
}

// clustersOf is the root, with what earlier calls have left cleaned away.
func clustersOf(c *cli.Context) (throwaway.Root, error) {
	if os.Geteuid() != 0 {
		return "", errNotRoot
	}
	dir, err := filepath.Abs(c.String("clusters"))
	if err != nil {
		return "", err
	}
	root := throwaway.Root(dir)
	return root, root.Sweep()
}

// throwawayPossible fails with what this machine lacks to have machines on it.
func throwawayPossible(ctx context.Context) error {
	results, err := preflight.Required(ctx, preflight.DefaultConfig())
	if err == nil {
		return nil
	}
	// Ports, routes and folders are those of the machines, not of this one. The first
	// finding is the cause of most others.
	for _, r := range results {
		if r.Level == preflight.Error && slices.Contains([]string{"privileges", "namespaces", "cgroups", "links", "nftables"}, r.Check) {
			return fmt.Errorf("this machine cannot have clusters on it: %s; %s", r.Message, r.Remedy)
		}
	}
	return nil
}

// runWith runs the user's command with a kubeconfig and returns its exit code, as a
// shell would give it.
func runWith(ctx context.Context, command []string, kubeconfig string) (int, error) {
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig)
	// A signal to us is a signal to it; one from the terminal it gets by itself.
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

func downCommand() *cli.Command {
	return &cli.Command{
		Name:      "down",
		Usage:     "Remove throwaway clusters with all that belongs to them",
		ArgsUsage: "[NAME...]",
		Flags:     []cli.Flag{rootFlag(), &cli.BoolFlag{Name: "all", Category: catCluster, Usage: "All of them, and the templates"}},
		Action: func(c *cli.Context) error {
			root, err := clustersOf(c)
			if err != nil {
				return err
			}
			names := c.Args().Slice()
			if c.Bool("all") {
				if len(names) > 0 {
					return errors.New("name clusters or say --all, not both")
				}
				all, err := root.List()
				if err != nil {
					return err
				}
				for _, cluster := range all {
					names = append(names, cluster.Name())
				}
			} else if len(names) == 0 {
				names = []string{defaultCluster}
			}
			var errs []error
			for _, name := range names {
				errs = append(errs, root.Remove(name))
			}
			if c.Bool("all") {
				errs = append(errs, root.RemoveTemplates())
			}
			return errors.Join(errs...)
		},
	}
}

func lsCommand() *cli.Command {
	return &cli.Command{
		Name:  "ls",
		Usage: "List throwaway clusters and their nodes",
		Flags: []cli.Flag{rootFlag()},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("\"kedge ls\" takes flags only, not %q", c.Args().First())
			}
			root, err := clustersOf(c)
			if err != nil {
				return err
			}
			all, err := root.List()
			if err != nil {
				return err
			}
			t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "CLUSTER\tNODE\tADDRESS\tSTATE\tAGE")
			for _, listed := range all {
				if err := listNodes(t, root, listed); err != nil {
					return err
				}
			}
			return t.Flush()
		},
	}
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
			state = "kedge ended: " + st.Ended
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", cluster.Name(), m.Name(), m.Addrs()[0].Addr(), state, time.Since(cluster.Created()).Round(time.Second))
	}
	return nil
}

func logsCommand() *cli.Command {
	return &cli.Command{
		Name:      "logs",
		Usage:     "Print what the nodes of a throwaway cluster have logged",
		ArgsUsage: "[NODE...]",
		Flags:     []cli.Flag{clusterNameFlag(), rootFlag()},
		Action: func(c *cli.Context) error {
			return withCluster(c, func(cluster *throwaway.Cluster) error {
				nodes := cluster.Site().Machines()
				if c.Args().Present() {
					nodes = nil
					for _, name := range c.Args().Slice() {
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
						fmt.Fprintf(c.App.Writer, "==> %s <==\n", m.Name())
					}
					_, err = io.Copy(c.App.Writer, log)
					log.Close()
					if err != nil {
						return err
					}
				}
				return nil
			})
		},
	}
}

// withCluster runs f with the cluster that --name names.
func withCluster(c *cli.Context, f func(*throwaway.Cluster) error) error {
	root, err := clustersOf(c)
	if err != nil {
		return err
	}
	cluster, err := root.Open(c.String("name"))
	if err != nil {
		return err
	}
	return errors.Join(f(cluster), cluster.Close())
}
