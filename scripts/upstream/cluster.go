package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
)

// cluster is a throwaway cluster under test.
type cluster struct {
	o          options
	dir        string // for files of this run
	kubeconfig string
	nodes      []string
	registry   *registry
}

// The cluster has this name in a folder of its own, so that the next run finds and removes a cluster that a
// killed run has left.
const clusterName = "upstream"

func newCluster(ctx context.Context, o options, dir string) (_ *cluster, err error) {
	c := &cluster{o: o, dir: dir, kubeconfig: filepath.Join(dir, "kubeconfig")}
	if err := os.MkdirAll(o.clusters, 0o755); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(o.clusters, clusterName)); err == nil {
		if err := c.remove(); err != nil {
			return nil, err
		}
	}
	link := c.kubectl()
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	if err := os.Symlink(o.kedge, link); err != nil {
		return nil, err
	}
	args := []string{"up", "--name", clusterName, "--servers", fmt.Sprint(o.servers), "--agents", fmt.Sprint(o.agents),
		"--image", filepath.Join(o.build, "images.tar"), "--kubeconfig", c.kubeconfig, "--wait", "5m"}
	if o.dualStack {
		args = append(args, "--dual-stack")
	}
	up := c.command(ctx, args...)
	up.Stderr = os.Stderr
	up.Cancel = func() error { return up.Process.Signal(os.Interrupt) } // kedge removes the cluster on a signal
	up.WaitDelay = time.Minute
	if err := up.Run(); err != nil {
		return nil, fmt.Errorf("kedge up: %w", errors.Join(context.Cause(ctx), err))
	}
	for i := range o.servers {
		c.nodes = append(c.nodes, fmt.Sprint("server-", i+1))
	}
	for i := range o.agents {
		c.nodes = append(c.nodes, fmt.Sprint("agent-", i+1))
	}
	if err := c.configure(ctx); err != nil {
		return nil, errors.Join(err, c.remove())
	}
	return c, nil
}

// configure sets the settings of the nodes that depend on their network, which is known only when they run: a
// registry on this machine, with its address on that network, and a pool of addresses that this machine can
// reach. It restarts the nodes.
func (c *cluster) configure(ctx context.Context) (err error) {
	if c.registry, err = openRegistry(filepath.Join(c.o.build, "images.tar")); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", c.kubeconfig)
	if err != nil {
		return err
	}
	api, err := url.Parse(config.Host)
	if err != nil {
		return err
	}
	node, err := netip.ParseAddr(api.Hostname())
	if err != nil {
		return err
	}
	// The kernel returns the source address for connections to the node.
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(node, 9)))
	if err != nil {
		return err
	}
	address := conn.LocalAddr().(*net.UDPAddr).IP.String()
	conn.Close()
	if address, err = c.registry.serve(address); err != nil {
		return err
	}
	forAll := fmt.Sprintf("printf %%s 'mirrors: {%s: {endpoint: [\"http://%s\"]}}' > /etc/kedge/registries.yaml", mirrored, address)
	forServers := forAll
	if c.o.pool {
		forServers += fmt.Sprintf(" && echo 'lb-pool: [%s]' >> /etc/kedge/config.yaml", poolOf(node))
	}
	for i, node := range c.nodes {
		settings := forAll
		if i < c.o.servers {
			settings = forServers
		}
		for _, args := range [][]string{
			{"node", "shell", "--name", clusterName, node, "--", "sh", "-c", settings},
			{"node", "stop", "--name", clusterName, node},
			{"node", "start", "--name", clusterName, node},
		} {
			if out, err := c.command(ctx, args...).CombinedOutput(); err != nil {
				return fmt.Errorf("kedge %s: %w: %s", strings.Join(args[:2], " "), errors.Join(context.Cause(ctx), err), bytes.TrimSpace(out))
			}
		}
	}
	return nil
}

// poolOf returns a range of a node's network from which "kedge up" assigns no address to the first two hundred
// machines.
func poolOf(node netip.Addr) string {
	first, last := node.As4(), node.As4()
	first[3], last[3] = 210, 250
	return netip.AddrFrom4(first).String() + "-" + netip.AddrFrom4(last).String()
}

// command returns a kedge command with the folder of this program's clusters.
func (c *cluster) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.o.kedge, args...)
	cmd.Env = append(os.Environ(), "KEDGE_CLUSTERS="+c.o.clusters)
	return cmd
}

// remove removes the cluster, even if the run was cancelled.
func (c *cluster) remove() error {
	out, err := c.command(context.Background(), "down", clusterName).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("kedge down: %w: %s", err, bytes.TrimSpace(out))
	}
	if c.registry != nil {
		err = errors.Join(err, c.registry.close())
		c.registry = nil
	}
	return err
}

// log returns the log of a node's kedge.
func (c *cluster) log(node string) ([]byte, error) {
	out, err := c.command(context.Background(), "logs", "--name", clusterName, node).Output()
	if err != nil {
		return nil, fmt.Errorf("kedge logs %s: %w", node, err)
	}
	return out, nil
}

// kubectl is a link by which kedge acts as kubectl.
func (c *cluster) kubectl() string { return filepath.Join(c.dir, "kubectl") }

// within returns the lines of a log that were written between begin and end. A line without a time belongs to
// the line before it.
func within(log []byte, begin, end time.Time) []byte {
	var out bytes.Buffer
	inside := false
	for line := range bytes.Lines(log) {
		if rest, ok := bytes.CutPrefix(line, []byte("time=")); ok {
			text, _, _ := strings.Cut(string(rest), " ")
			if t, err := time.Parse(time.RFC3339, strings.TrimSpace(text)); err == nil {
				inside = !t.Before(begin) && !t.After(end)
			}
		}
		if inside {
			out.Write(line)
		}
	}
	return out.Bytes()
}
