package cni

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"kedge/internal/namespaces"
	"kedge/network/cniclient"
	"kedge/network/ipam"
	"kedge/network/nft/pods"
)

// Setup is the configuration of new pods. It may change while pods run.
type Setup struct {
	Ranges []netip.Prefix // pod ranges of this node, one for each family; empty until they are known
	MTU    int
}

// Plugin answers CNI requests. It may be used from many goroutines; requests for the same
// attachment wait for each other.
type Plugin struct {
	node   string
	prefix string
	ledger *ipam.Ledger
	table  hostPortTable
	policy PolicyEngine // nil if every connection is allowed
	log    *slog.Logger
	owners keyedMutex

	mu    sync.Mutex // guards setup and ports; held while a lease is made, so that two pods cannot get the same port
	setup Setup
	ports map[string][]pods.HostPort // by owner

	portsMu     sync.Mutex  // one write of host ports at a time, each with the newest ports
	unpublished atomic.Bool // the last write failed: the table has the ports of an earlier moment
}

// hostPortTable writes host ports to the kernel; see [pods.Table].
type hostPortTable interface {
	SetHostPorts(ports []pods.HostPort) error
}

// New returns the plugin of a node, which keeps the host ports in table. Without a policy
// engine every connection is allowed. Call Adopt, PublishHostPorts and Reconcile, in this
// order, before the first request.
func New(node string, ledger *ipam.Ledger, table hostPortTable, policy PolicyEngine, log *slog.Logger) *Plugin {
	p := &Plugin{
		node: node, prefix: LinkPrefix(node), ledger: ledger, table: table, policy: policy, log: log,
		ports: map[string][]pods.HostPort{},
	}
	ledger.Avoid(p.inUse)
	for _, lease := range ledger.Leases() {
		if n, err := readNote(lease); err == nil {
			p.ports[lease.Owner] = translations(n.Ports, lease.Addrs)
		}
	}
	return p
}

// Configure sets the configuration of new pods. Running pods keep theirs.
func (p *Plugin) Configure(s Setup) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.setup = s
	p.ledger.SetRanges(s.Ranges)
}

// Handle answers one request.
func (p *Plugin) Handle(ctx context.Context, r cniclient.Request) cniclient.Response {
	var conf config
	var result types.Result
	conf, err := parseConfig(r.Config)
	if err == nil {
		result, err = p.dispatch(ctx, r, conf)
	}
	if err != nil {
		return failed(conf.CNIVersion, r, err)
	}
	if result == nil {
		return cniclient.Response{}
	}
	out, err := encode(result, conf.CNIVersion)
	if err != nil {
		return failed(conf.CNIVersion, r, err)
	}
	return cniclient.Response{Output: out}
}

func (p *Plugin) dispatch(ctx context.Context, r cniclient.Request, c config) (types.Result, error) {
	switch r.Command {
	case "ADD":
		return p.add(ctx, r, c)
	case "DEL":
		return nil, p.del(r)
	case "CHECK":
		return nil, p.check(r)
	case "GC":
		return nil, p.garbageCollect(c)
	case "STATUS":
		return nil, p.status()
	}
	return nil, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("unknown CNI_COMMAND %q", r.Command), "")
}

// status returns an error if ADD would fail.
func (p *Plugin) status() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.setup.Ranges) == 0 {
		return types.NewError(types.ErrPluginNotAvailable, "pod network is not ready", ipam.ErrNoRange.Error())
	}
	return nil
}

func (p *Plugin) add(ctx context.Context, r cniclient.Request, c config) (types.Result, error) {
	if err := checkRequest(r, true); err != nil {
		return nil, err
	}
	ports, err := c.hostPorts()
	if err != nil {
		return nil, err
	}
	own := owner(r.ContainerID, r.IfName)
	defer p.owners.lock(own)()
	if err := context.Cause(ctx); err != nil {
		return nil, err // the client has gone
	}
	ns, err := namespaces.OpenNetwork(r.Netns)
	if err != nil {
		return nil, types.NewError(types.ErrInvalidNetNS, "open the pod's network namespace", err.Error())
	}
	defer ns.Close()

	n := note{Netns: r.Netns, NetnsID: ns.ID(), Ports: ports}
	n.Pod, n.UID = podName(r.Args)
	lease, setup, err := p.lease(own, n)
	if err != nil {
		return nil, err
	}
	a := p.attachment(lease, n, setup.MTU)
	if p.policy != nil {
		err = p.policy.Attach(ctx, attachmentOf(lease, n))
	}
	if err == nil {
		err = a.connect(ns)
	}
	if err == nil && len(ports) > 0 {
		err = p.PublishHostPorts()
		deleteFlows(lease.Addrs, ports, p.log)
	}
	if err != nil {
		return nil, errors.Join(err, p.remove(own))
	}
	p.log.Debug("pod attached", "pod", n.Pod, "container", r.ContainerID, "addresses", lease.Addrs, "interface", a.host)
	return a.result(r.Netns), nil
}

// lease records what the pod gets before any of it exists.
func (p *Plugin) lease(own string, n note) (ipam.Lease, Setup, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.setup.Ranges) == 0 {
		return ipam.Lease{}, Setup{}, types.NewError(types.ErrTryAgainLater, ipam.ErrNoRange.Error(), "")
	}
	if err := p.portsFree(own, n.Ports); err != nil {
		return ipam.Lease{}, Setup{}, err
	}
	raw, err := json.Marshal(n)
	if err != nil {
		return ipam.Lease{}, Setup{}, err
	}
	lease, err := p.ledger.Allocate(own, raw)
	if errors.Is(err, ipam.ErrExhausted) {
		err = types.NewError(types.ErrTryAgainLater, err.Error(), "")
	}
	if err != nil {
		return ipam.Lease{}, Setup{}, err
	}
	p.ports[own] = translations(n.Ports, lease.Addrs)
	return lease, p.setup, nil
}

// portsFree checks the host ports against those of all other pods. Caller holds mu.
func (p *Plugin) portsFree(own string, ports []hostPort) error {
	if len(ports) == 0 {
		return nil
	}
	for _, lease := range p.ledger.Leases() {
		if lease.Owner == own {
			continue
		}
		other, err := readNote(lease)
		if err != nil {
			continue // adopted without ports
		}
		for _, a := range ports {
			for _, b := range other.Ports {
				if a.conflicts(b) {
					return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("host port %s belongs to pod %s", a, cmp.Or(other.Pod, lease.Owner)), "")
				}
			}
		}
	}
	return nil
}

func (p *Plugin) del(r cniclient.Request) error {
	if err := checkRequest(r, false); err != nil {
		return err
	}
	own := owner(r.ContainerID, r.IfName)
	defer p.owners.lock(own)()
	if err := p.remove(own); err != nil {
		return err
	}
	p.log.Debug("pod detached", "container", r.ContainerID)
	return nil
}

// remove undoes an attachment in any state: first the host ports, then the interface, and
// last the lease with its addresses.
func (p *Plugin) remove(own string) error {
	lease, leased := p.ledger.Get(own)
	p.mu.Lock()
	published := len(p.ports[own]) > 0
	delete(p.ports, own)
	p.mu.Unlock()
	if published || p.unpublished.Load() {
		if err := p.PublishHostPorts(); err != nil {
			return err
		}
	}
	node, err := routeSocket()
	if err != nil {
		return err
	}
	defer node.Close()
	if err := removeLink(node, linkName(p.prefix, own)); err != nil {
		return err
	}
	if !leased {
		return nil
	}
	if p.policy != nil {
		if err := p.policy.Detach(own); err != nil {
			return err
		}
	}
	if n, err := readNote(lease); err == nil && len(n.Ports) > 0 {
		deleteFlows(lease.Addrs, n.Ports, p.log)
	}
	return p.ledger.Release(own)
}

func (p *Plugin) check(r cniclient.Request) error {
	if err := checkRequest(r, true); err != nil {
		return err
	}
	own := owner(r.ContainerID, r.IfName)
	defer p.owners.lock(own)()
	lease, ok := p.ledger.Get(own)
	if !ok {
		return types.NewError(types.ErrUnknownContainer, "pod is not attached", own)
	}
	n, err := readNote(lease)
	if err != nil {
		return err
	}
	ns, err := namespaces.OpenNetwork(r.Netns)
	if err != nil {
		return types.NewError(types.ErrInvalidNetNS, "open the pod's network namespace", err.Error())
	}
	defer ns.Close()
	return p.attachment(lease, n, 0).check(ns)
}

// garbageCollect releases all attachments that are unknown to the runtime.
func (p *Plugin) garbageCollect(c config) error {
	valid := map[string]bool{}
	for _, a := range c.ValidAttachments {
		valid[owner(a.ContainerID, a.IfName)] = true
	}
	var errs []error
	for _, lease := range p.ledger.Leases() {
		if valid[lease.Owner] {
			continue
		}
		unlock := p.owners.lock(lease.Owner)
		p.log.Info("attachment released: unknown to the container runtime", "attachment", lease.Owner)
		errs = append(errs, p.remove(lease.Owner))
		unlock()
	}
	return errors.Join(errs...)
}

// PublishHostPorts gives the table the host ports of all attachments.
func (p *Plugin) PublishHostPorts() error {
	p.portsMu.Lock()
	defer p.portsMu.Unlock()
	err := p.table.SetHostPorts(p.HostPorts())
	p.unpublished.Store(err != nil)
	return err
}

// HostPorts returns the host ports of all attachments.
func (p *Plugin) HostPorts() []pods.HostPort {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []pods.HostPort
	for _, ports := range p.ports {
		all = append(all, ports...)
	}
	slices.SortFunc(all, func(a, b pods.HostPort) int {
		return cmp.Or(a.HostIP.Compare(b.HostIP), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port), a.Pod.Compare(b.Pod))
	})
	return all
}

// translations returns a pod's host ports for each of its addresses.
func translations(ports []hostPort, addrs []netip.Addr) []pods.HostPort {
	var all []pods.HostPort
	for _, port := range ports {
		for _, addr := range addrs {
			if port.HostIP.IsValid() && port.HostIP.Is4() != addr.Is4() {
				continue
			}
			hostIP := port.HostIP
			if hostIP.IsUnspecified() {
				hostIP = netip.Addr{}
			}
			all = append(all, pods.HostPort{
				HostIP: hostIP, Port: port.Host, Protocol: port.Protocol,
				Pod: netip.AddrPortFrom(addr, port.Pod),
			})
		}
	}
	return all
}

// attachment derives the interfaces, addresses and routes from a lease: the same lease
// always gives the same attachment, also after a restart.
func (p *Plugin) attachment(lease ipam.Lease, n note, mtu int) *attachment {
	_, ifName := splitOwner(lease.Owner)
	a := &attachment{
		host: linkName(p.prefix, lease.Owner), pod: ifName, alias: alias(p.node, lease.Owner), mtu: mtu,
		hostHW: hardwareAddr("node/" + p.node + "/" + lease.Owner), podHW: hardwareAddr("pod/" + p.node + "/" + lease.Owner),
	}
	p.mu.Lock()
	ranges := p.setup.Ranges
	p.mu.Unlock()
	for _, addr := range lease.Addrs {
		a.addrs = append(a.addrs, podAddr{addr: addr, gateway: gatewayFor(addr, ranges)})
		a.v6 = a.v6 || addr.Is6()
		a.local = a.local || addr.Is4() && len(n.Ports) > 0
	}
	return a
}

// gatewayFor returns the node's address in the range of a pod's address. For an address of
// a range that the node no longer has, it returns the gateway of the current range: any
// address of the node works.
func gatewayFor(addr netip.Addr, ranges []netip.Prefix) netip.Addr {
	var other netip.Addr
	for _, r := range ranges {
		if r.Contains(addr) {
			return ipam.Gateway(r)
		}
		if r.Addr().Is4() == addr.Is4() {
			other = ipam.Gateway(r)
		}
	}
	return other
}

func readNote(lease ipam.Lease) (note, error) {
	var n note
	if len(lease.Note) == 0 {
		return n, fmt.Errorf("attachment %s: %w", lease.Owner, fs.ErrNotExist)
	}
	if err := json.Unmarshal(lease.Note, &n); err != nil {
		return n, fmt.Errorf("read the lease note of attachment %s: %w", lease.Owner, err)
	}
	return n, nil
}

// result returns the CNI result of the attachment.
func (a *attachment) result(netnsPath string) *types100.Result {
	res := &types100.Result{
		CNIVersion: types100.ImplementedSpecVersion,
		Interfaces: []*types100.Interface{
			{Name: a.host, Mac: a.hostHW.String(), Mtu: a.mtu},
			{Name: a.pod, Mac: a.podHW.String(), Mtu: a.mtu, Sandbox: netnsPath},
		},
	}
	for _, p := range a.addrs {
		res.IPs = append(res.IPs, &types100.IPConfig{
			Interface: types100.Int(1), Address: *hostNet(p.addr), Gateway: p.gateway.AsSlice(),
		})
		res.Routes = append(res.Routes, &types.Route{Dst: *defaultRoute(0, p.gateway).Dst, GW: p.gateway.AsSlice()})
	}
	return res
}
