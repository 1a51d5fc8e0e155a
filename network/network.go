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

	"kedge/internal/fswatch"
	"kedge/internal/lifecycle"
	"kedge/network/cni"
	"kedge/network/ipam"
	"kedge/network/nft"
	"kedge/network/nft/pods"
	"kedge/network/nft/policies"
	"kedge/network/trace"
)

// repairEvery is the interval of repair rounds that no event has requested.
const repairEvery = 5 * time.Minute

// ErrNotRunning is the error for requests to a node's network before or after its Run.
var ErrNotRunning = errors.New("pod network is not running")

// Network is the pod network of one node: a component of the process.
type Network struct {
	cfg    Config
	log    *slog.Logger
	table  *pods.Table
	policy cni.PolicyEngine // nil if every connection is allowed

	mu       sync.Mutex // guards what follows
	podCIDRs []netip.Prefix
	nodes    []netip.Addr // of other nodes with a route to this node's pods
	tunnels  []string     // interfaces through which they are reached
	nodeIPs  []netip.Addr // of this node
	plugin   *cni.Plugin  // while running
	failure  error        // of the last repair

	wake lifecycle.Wakeup // requests a repair round
}

// New returns the network of a node; policy decides about the connections of its pods, or
// is nil. New changes nothing on the machine; Run does.
func New(cfg Config, policy cni.PolicyEngine, log *slog.Logger) *Network {
	return &Network{
		cfg: cfg, log: log.With("component", "network"),
		table:    pods.NewTable(cfg.NodeName),
		policy:   policy,
		podCIDRs: slices.Clone(cfg.PodCIDRs), nodeIPs: cfg.NodeIPs,
		wake: lifecycle.NewWakeup(),
	}
}

// Name returns "network".
func (n *Network) Name() string { return "network" }

// SetPodCIDRs sets the ranges of the node's pods, once the API has assigned them. The first
// call makes the container runtime report the network as ready. It may be called before,
// during and after Run, and again with other ranges: running pods keep their addresses.
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
		return nil // Run applies them
	}
	if err := n.configure(); err != nil {
		n.podCIDRs = before // so that the same call may be retried
		return err
	}
	n.wake.Wake() // without ranges, damaged attachments could not be repaired
	return nil
}

// SetNodes sets the addresses of other nodes with a route to this node's pods: these nodes
// see the pods' own addresses. tunnels are the interfaces through which they are reached,
// if any. It may be called before, during and after Run. The caller must not change the
// lists afterwards.
func (n *Network) SetNodes(addrs []netip.Addr, tunnels []string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if slices.Equal(n.nodes, addrs) && slices.Equal(n.tunnels, tunnels) {
		return nil
	}
	nodesBefore, tunnelsBefore := n.nodes, n.tunnels
	n.nodes, n.tunnels = addrs, tunnels
	if n.plugin == nil {
		return nil // Run applies them
	}
	if err := n.applyRules(); err != nil {
		n.nodes, n.tunnels = nodesBefore, tunnelsBefore // so that the same call may be retried
		return err
	}
	return nil
}

// SetNodeIPs sets the addresses of this node in the network between the nodes. New pods get
// the MTU of the interface with these addresses.
func (n *Network) SetNodeIPs(addrs []netip.Addr) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	before := n.nodeIPs
	n.nodeIPs = addrs
	if n.plugin == nil || len(n.podCIDRs) == 0 || slices.Equal(before, addrs) {
		return nil
	}
	if err := n.configure(); err != nil {
		n.nodeIPs = before // so that the same call may be retried
		return err
	}
	return nil
}

// Rules returns the node's rules for host ports and outbound traffic, for tracing.
func (n *Network) Rules() trace.Part { return n.table }

// Firewall returns the rules of other programs, for tracing.
func (n *Network) Firewall() trace.Part { return firewall{cni.LinkPrefix(n.cfg.NodeName)} }

// Run sets the node up and answers CNI requests until ctx is cancelled. It is ready when
// the runtime may call; until the pod ranges are known it answers "try again later",
// because kubelet and API server assign them only to a running node.
func (n *Network) Run(ctx context.Context, ready func()) error {
	if err := n.cfg.Validate(); err != nil {
		return err
	}
	boot, err := ipam.BootID()
	if err != nil {
		return err
	}
	ledger, err := ipam.Open(n.cfg.ledgerDir(), boot)
	if err != nil && !errors.Is(err, ipam.ErrDamaged) {
		return err
	}
	defer ledger.Close()
	if err != nil {
		n.log.Warn("cannot read all pod address leases; recovering them from the kernel", "err", err)
	}
	plugin := cni.New(n.cfg.NodeName, ledger, n.table, n.policy, n.log)
	if err := n.prepare(ctx, plugin); err != nil {
		return err
	}
	defer n.markStopped()

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
	start(func(ctx context.Context) error { return nft.Watch(ctx, n.wake.Wake) })
	start(func(ctx context.Context) error { return watchLinks(ctx, n.wake.Wake) })
	start(n.watchForwarding)
	start(func(ctx context.Context) error { n.repairLoop(ctx, plugin); return nil })
	start(func(ctx context.Context) error {
		if name := fswatch.Removed(ctx, n.cfg.socket()); name != "" {
			return fmt.Errorf("%s was removed while kedge was running; no other program may change the run directory", name)
		}
		return nil
	})
	ready()
	<-inner.Done()
	parts.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// prepare brings the machine into the state that the leases describe.
func (n *Network) prepare(ctx context.Context, plugin *cni.Plugin) error {
	published, err := n.table.HostPorts()
	if err != nil {
		return err
	}
	if err := plugin.Adopt(published); err != nil {
		n.log.Error("cannot recover the leases of some pod interfaces", "err", err)
	}
	if err := n.start(plugin); err != nil {
		return err
	}
	if n.policy == nil {
		if err := policies.RemoveTable(n.cfg.NodeName); err != nil {
			return err
		}
	}
	if err := plugin.Reconcile(ctx); err != nil {
		// An error of one pod must not keep the node from starting; the next round retries.
		n.log.Warn("some pods could not be reconciled", "err", err)
		n.wake.Wake()
	}
	plugin.RestorePolicy()
	return nil
}

func (n *Network) start(plugin *cni.Plugin) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, err := enableForwarding(n.wantsIPv6()); err != nil {
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
	if err := plugin.PublishHostPorts(); err != nil {
		return err
	}
	n.plugin = plugin
	if err := n.configure(); err != nil {
		n.plugin = nil
		return err
	}
	return nil
}

// configure applies known ranges. Caller holds mu.
func (n *Network) configure() error {
	if len(n.podCIDRs) == 0 {
		// Without a CNI configuration the runtime reports that its network is not ready.
		return errors.Join(n.applyRules(), cni.RemoveConf(n.cfg.ConfDir()))
	}
	if _, err := enableForwarding(n.wantsIPv6()); err != nil {
		return err
	}
	mtu, err := n.mtu()
	if err != nil {
		return err
	}
	n.plugin.Configure(cni.Setup{Ranges: n.podCIDRs, MTU: mtu})
	if err := n.applyRules(); err != nil {
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

// applyRules writes the table of the pods; the plugin keeps the host ports in it.
// Caller holds mu.
func (n *Network) applyRules() error {
	return n.table.Set(pods.Rules{
		LinkPrefix: cni.LinkPrefix(n.cfg.NodeName),
		PodRanges:  n.podCIDRs,
		Inside:     slices.Concat(n.cfg.ClusterCIDRs, n.cfg.ServiceCIDRs),
		Nodes:      n.nodes,
		Tunnels:    n.tunnels,
	})
}

// markStopped records that requests are no longer answered. Links and rules stay.
func (n *Network) markStopped() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.plugin = nil
	_ = n.table.Close() // every write has been acknowledged
}

// Check returns why pods cannot be attached, or cannot reach each other or the node, or
// nil.
func (n *Network) Check(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.plugin == nil:
		return ErrNotRunning
	case len(n.podCIDRs) == 0:
		return ipam.ErrNoRange
	case n.failure != nil:
		return n.failure
	}
	return n.checkFirewalls()
}

// Cleanup removes all that the network of a node has left in the kernel and in its
// directories. The node's processes must have ended.
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

// removeEmpty removes directories, except those with files of other programs.
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
