package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kedge/network/cni"
	"kedge/network/ipam"
	"kedge/network/nft"
	"kedge/network/trace"
)

// repairEvery is how often everything is looked at even though no event said
// that something changed.
const repairEvery = 5 * time.Minute

// ErrNotRunning says that a node's network was asked for something before its
// Run or after it.
var ErrNotRunning = errors.New("pod network is not running")

// Network is the pod network of one node: a component of the process.
type Network struct {
	cfg   Config
	log   *slog.Logger
	table *nft.PodTable
	judge cni.Judge // nil if every connection is allowed

	mu       sync.Mutex // guards what follows
	podCIDRs []netip.Prefix
	nodes    []netip.Addr // others that have a route to our pods
	tunnels  []string     // by which they are reached
	nodeIPs  []netip.Addr // of this node
	plugin   *cni.Plugin  // while running
	failure  error        // why the last repair failed

	wake chan struct{} // asks for a round of repair; holds one request
}

// New returns the network of a node; judge decides which connections its pods may
// have, or is nil. It changes nothing before Run.
func New(cfg Config, judge cni.Judge, log *slog.Logger) *Network {
	return &Network{
		cfg: cfg, log: log.With("component", "network"),
		table:    nft.NewPodTable(cfg.NodeName),
		judge:    judge,
		podCIDRs: slices.Clone(cfg.PodCIDRs), nodeIPs: cfg.NodeIPs,
		wake: make(chan struct{}, 1),
	}
}

// Name returns "network".
func (n *Network) Name() string { return "network" }

// SetPodCIDRs says which ranges the node's pods have, once the API has assigned
// them. The first call makes the container runtime report the network as ready.
// It may be called before, during and after Run, and again with other ranges:
// pods that run keep their addresses.
func (n *Network) SetPodCIDRs(ranges []netip.Prefix) error {
	if err := checkPodCIDRs(ranges); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Equal(n.podCIDRs, ranges) {
		return nil
	}
	before := n.podCIDRs
	n.podCIDRs = slices.Clone(ranges)
	if n.plugin == nil {
		return nil // Run begins with them
	}
	if err := n.configure(); err != nil {
		n.podCIDRs = before // so that the same call may be tried again
		return err
	}
	return nil
}

// SetNodes says which addresses are other nodes' that have a route to this node's
// pods: those see the pods' own addresses. tunnels are the interfaces by which they are
// reached, if not directly. It may be called before, during and after Run. The caller must
// not change the lists afterwards.
func (n *Network) SetNodes(addrs []netip.Addr, tunnels []string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Equal(n.nodes, addrs) && slices.Equal(n.tunnels, tunnels) {
		return nil
	}
	nodesBefore, tunnelsBefore := n.nodes, n.tunnels
	n.nodes, n.tunnels = addrs, tunnels
	if n.plugin == nil {
		return nil // Run begins with them
	}
	if err := n.applyRules(n.plugin.HostPorts()); err != nil {
		n.nodes, n.tunnels = nodesBefore, tunnelsBefore // so that the same call may be tried again
		return err
	}
	return nil
}

// SetNodeIPs says which addresses this node has towards others from now on. Pods that come
// later get the MTU of the interface that has them.
func (n *Network) SetNodeIPs(addrs []netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	before := n.nodeIPs
	n.nodeIPs = addrs
	if n.plugin == nil || len(n.podCIDRs) == 0 || slices.Equal(before, addrs) {
		return nil
	}
	if err := n.configure(); err != nil {
		n.nodeIPs = before // so that the same call may be tried again
		return err
	}
	return nil
}

// Rules returns the part of the node's rules that is about host ports and the way
// out of the cluster, for those who want to see what it does.
func (n *Network) Rules() trace.Part { return n.table }

// Run sets the node up and answers CNI requests until ctx is cancelled. It is
// ready when the runtime may call; until the pod ranges are known the answer is
// to try again later, because kubelet and API need a running node to assign them.
func (n *Network) Run(ctx context.Context, ready func()) error {
	if err := n.cfg.Validate(); err != nil {
		return err
	}
	boot, err := ipam.BootID()
	if err != nil {
		return err
	}
	ledger, err := ipam.Open(n.cfg.ledgerDir(), boot)
	damaged := errors.Is(err, ipam.ErrDamaged)
	if err != nil && !damaged {
		return err
	}
	defer ledger.Close()
	if damaged {
		n.log.Warn("leases are recovered from the kernel", "cause", err)
	}
	plugin := cni.New(n.cfg.NodeName, ledger, n.setHostPorts, n.judge, n.log)
	if err := n.prepare(ctx, plugin, damaged); err != nil {
		return err
	}
	defer n.stopped()

	socket, err := cni.Listen(n.cfg.socket())
	if err != nil {
		return err
	}
	inner, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var parts sync.WaitGroup
	start := func(run func(context.Context) error) {
		parts.Go(func() {
			if err := run(inner); err != nil {
				fail(err)
			}
		})
	}
	start(func(ctx context.Context) error { return plugin.Serve(ctx, socket) })
	start(func(ctx context.Context) error { return nft.Watch(ctx, n.repairSoon) })
	start(func(ctx context.Context) error { return watchLinks(ctx, n.repairSoon) })
	start(func(ctx context.Context) error { n.repairLoop(ctx, plugin); return nil })
	ready()
	<-inner.Done()
	parts.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// prepare brings the machine into the state that the leases describe.
func (n *Network) prepare(ctx context.Context, plugin *cni.Plugin, adopt bool) error {
	if err := n.begin(plugin); err != nil {
		return err
	}
	if n.judge == nil {
		if err := nft.RemovePolicyTable(n.cfg.NodeName); err != nil {
			return err
		}
	}
	if err := plugin.Reconcile(ctx, adopt); err != nil {
		// What is wrong with one pod must not keep the node from starting;
		// the next round tries again.
		n.log.Warn("some pods could not be reconciled", "error", err)
		n.repairSoon()
	}
	plugin.RestoreJudge()
	return nil
}

func (n *Network) begin(plugin *cni.Plugin) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := enableForwarding(n.wantsIPv6()); err != nil {
		return err
	}
	executable := n.cfg.Plugin
	if executable == "" {
		var err error
		if executable, err = os.Executable(); err != nil {
			return fmt.Errorf("find the running executable: %w", err)
		}
	}
	if err := cni.InstallPlugin(n.cfg.BinDir(), executable); err != nil {
		return err
	}
	n.plugin = plugin
	if err := n.configure(); err != nil {
		n.plugin = nil
		return err
	}
	return nil
}

// configure makes known ranges effective. Caller holds mu.
func (n *Network) configure() error {
	if len(n.podCIDRs) == 0 {
		// Without a configuration the runtime reports that its network is not ready.
		return errors.Join(n.applyRules(n.plugin.HostPorts()), cni.RemoveConf(n.cfg.ConfDir()))
	}
	if err := enableForwarding(n.wantsIPv6()); err != nil {
		return err
	}
	mtu, err := n.mtu()
	if err != nil {
		return err
	}
	n.plugin.Configure(cni.Setup{Ranges: n.podCIDRs, MTU: mtu})
	if err := n.applyRules(n.plugin.HostPorts()); err != nil {
		return err
	}
	if err := cni.WriteConf(n.cfg.ConfDir(), n.cfg.socket()); err != nil {
		return err
	}
	n.log.Info("pod ranges in use", "ranges", n.podCIDRs, "mtu", mtu)
	return nil
}

func (n *Network) wantsIPv6() bool {
	return slices.ContainsFunc(slices.Concat(n.podCIDRs, n.cfg.ClusterCIDRs), func(p netip.Prefix) bool { return p.Addr().Is6() })
}

// setHostPorts is called by the plugin whenever pods with host ports come or go.
func (n *Network) setHostPorts(ports []nft.HostPort) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.applyRules(ports)
}

// applyRules writes the table of the pods. Caller holds mu.
func (n *Network) applyRules(ports []nft.HostPort) error {
	return n.table.Set(nft.PodRules{
		LinkPrefix: cni.LinkPrefix(n.cfg.NodeName),
		PodRanges:  n.podCIDRs,
		Inside:     slices.Concat(n.cfg.ClusterCIDRs, n.cfg.ServiceCIDRs),
		Nodes:      n.nodes,
		Tunnels:    n.tunnels,
		HostPorts:  ports,
	})
}

// stopped notes that nothing answers any more. Links and rules stay.
func (n *Network) stopped() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.plugin = nil
	_ = n.table.Close() // all that was sent has been answered
}

// Check says why pods cannot be attached, or nil.
func (n *Network) Check(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.plugin == nil:
		return ErrNotRunning
	case len(n.podCIDRs) == 0:
		return ipam.ErrNoRange
	}
	return n.failure
}

// Cleanup removes everything that the network of a node has left in the kernel
// and in its directories. The node's processes must have ended.
func Cleanup(cfg Config) error {
	return errors.Join(
		cni.RemoveLinks(cfg.NodeName),
		nft.RemoveTables(cfg.NodeName),
		cni.RemoveConf(cfg.ConfDir()),
		cni.RemovePlugin(cfg.BinDir()),
		os.RemoveAll(cfg.ledgerDir()),
		removeSocket(cfg.socket()),
		removeEmpty(cfg.BinDir(), cfg.ConfDir(), filepath.Dir(cfg.BinDir()), filepath.Dir(cfg.ledgerDir())),
	)
}

// removeEmpty removes directories unless somebody else has files in them.
func removeEmpty(dirs ...string) error {
	for _, dir := range dirs {
		err := os.Remove(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return fmt.Errorf("remove directory: %w", err)
		}
	}
	return nil
}

func removeSocket(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove CNI socket: %w", err)
	}
	return nil
}
