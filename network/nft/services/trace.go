package services

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
	"kedge/network/trace"
)

// Trace implements trace.Part: it reads the sets from the kernel and evaluates the rules.
func (t *Table) Trace(_ context.Context, stage trace.Stage, p *trace.Packet) ([]trace.Step, error) {
	if stage == trace.Filter {
		return nil, nil // services have no rules there
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	v := &kernelView{table: t, sets: map[setID]map[string]string{}}
	var err error
	if v.chains, err = nft.Comments(t.name); err != nil {
		return nil, err
	}
	w := &walk{kernelView: v, p: p, f: familyOf(p.To.Addr.Addr())}
	switch stage {
	case trace.Destination:
		err = w.destination()
	case trace.Source:
		err = w.source()
	}
	return w.steps, err
}

// kernelView is the kernel's content, read on demand.
type kernelView struct {
	table  *Table
	chains map[string][]string // comments of rules
	sets   map[setID]map[string]string
}

func (v *kernelView) lookup(id setID, key string) (string, bool, error) {
	if v.sets[id] == nil {
		conn, err := nftables.New()
		if err != nil {
			return "", false, fmt.Errorf("open nftables: %w", err)
		}
		list, err := conn.GetSetElements(id.describe().In(v.table.table()))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return "", false, fmt.Errorf("read set %s: %w", id.name(), err)
		}
		v.sets[id] = map[string]string{}
		for _, e := range list {
			got := id.from(e)
			v.sets[id][got.key] = got.val
		}
	}
	val, ok := v.sets[id][key]
	return val, ok, nil
}

// walk is a packet on its way through the table.
type walk struct {
	*kernelView
	p     *trace.Packet
	f     family
	steps []trace.Step
}

// add records a step, with a problem if the kernel does not have the rule.
func (w *walk) add(chain, rule, element, effect string) *trace.Step {
	w.steps = append(w.steps, trace.RuleStep(w.chains, w.table.name, chain, rule, element, effect))
	return &w.steps[len(w.steps)-1]
}

func (w *walk) end(chain, rule, element, effect string) {
	w.add(chain, rule, element, effect)
	w.p.Ended = true
}

// get looks up a key in the kernel, and returns a problem if the kernel's value is not the
// wanted one.
func (w *walk) get(k setKind, key string) (val string, ok bool, problem string, err error) {
	id := w.f.set(k)
	val, ok, err = w.lookup(id, key)
	if err != nil {
		return "", false, "", err
	}
	switch want, wanted := w.table.want[ref{id, key}]; {
	case wanted && !ok:
		problem = fmt.Sprintf("the kernel's set %s lacks the element; it should be %s", id.name(), id.text(key, want.val))
	case ok && !wanted && k != kindClients:
		problem = fmt.Sprintf("the kernel's set %s has an element that should not be there", id.name())
	case ok && val != want.val && k != kindClients:
		problem = fmt.Sprintf("the kernel's set %s should have %s", id.name(), id.text(key, want.val))
	}
	return val, ok, problem, nil
}

// destination evaluates the chains prerouting and output.
func (w *walk) destination() error {
	p, cfg := w.p, w.table.cfg
	base := chainPrerouting
	if p.From.Place == trace.Node {
		base = chainOutput
	}
	w.add(base, "services", "", "the first packet of a connection is looked up among the services")
	to := p.To.Addr.Addr()
	if slices.Contains(cfg.Own, to) {
		w.add(chainServices, "the node answers "+to.String()+" itself", "", "left as it is: a process of the node answers this cluster IP")
		return nil
	}
	is6 := w.f.Proto == unix.NFPROTO_IPV6
	at := frontend{addr: to, is6: is6, protocol: p.Protocol, port: p.To.Addr.Port()}
	found, err := w.decide("addresses of services", kindServices, at)
	if found || err != nil {
		return err
	}
	for _, r := range cfg.NodePortsOn {
		if p.To.Place != trace.Node || !r.Contains(to) || w.f.Loopback.Contains(to) {
			continue
		}
		at := frontend{is6: is6, protocol: p.Protocol, port: at.port}
		if found, err := w.decide("node ports at "+r.String(), kindNodePorts, at); found || err != nil {
			return err
		}
	}
	_, ours, problem, err := w.get(kindClusterIPs, string(to.AsSlice()))
	if err != nil {
		return err
	}
	if ours && p.To.Place != trace.Node {
		s := w.add(chainServices, "other ports of the services' own addresses", w.f.set(kindClusterIPs).name()+": "+to.String(), "an address of services, and no service has the port")
		s.Problem += problem
		w.end(chainClusterIP, "the service has no such port", "", "refused: "+refusalText(p.Protocol))
		return nil
	}
	for _, r := range cfg.ServiceRanges {
		if r.Contains(to) && p.To.Place != trace.Node {
			w.end(chainServices, "no service has the cluster IP: "+r.String(), "", "dropped: an address for services that no service has")
			return nil
		}
	}
	w.steps[len(w.steps)-1].Effect += "; no service matches"
	w.steps[len(w.steps)-1].Problem += problem
	return nil
}

// decide evaluates the rule that looks up the chain of a frontend.
func (w *walk) decide(rule string, k setKind, at frontend) (bool, error) {
	id := w.f.set(k)
	chain, ok, problem, err := w.get(k, destination(at))
	if err != nil || (!ok && problem == "") {
		return false, err
	}
	if !ok {
		w.add(chainServices, rule, "", "nothing: the element of "+at.String()+" is missing").Problem = problem
		return false, nil
	}
	name, port := w.table.owner(at)
	c, known := w.table.classOf(port, at)
	if !known {
		w.end(chainServices, rule, id.name()+": "+id.text(destination(at), chain), "unknown: no service has this address")
		w.steps[len(w.steps)-1].Problem = problem
		return true, nil
	}
	s := w.add(chainServices, rule, id.name()+": "+id.text(destination(at), chain), fmt.Sprintf("%s of service %s, %s", at, name, c.text()))
	s.Problem = joinProblems(s.Problem, problem)
	return true, w.class(chain, c, port, at)
}

// owner returns the service that owns a frontend, and its port.
func (t *Table) owner(at frontend) (string, *Port) {
	names := t.claims[at]
	if len(names) == 0 {
		return "", nil
	}
	s := t.services[names[0]]
	for i := range s.Ports {
		if slices.Contains(s.Ports[i].frontends(), at) {
			return names[0], &s.Ports[i]
		}
	}
	return names[0], nil
}

// classOf returns the class of a frontend of a port.
func (t *Table) classOf(p *Port, at frontend) (class, bool) {
	if p == nil {
		return class{}, false
	}
	internal, external := p.classes(t.cfg.Scheduler)
	switch {
	case at == p.clusterFrontend():
		return internal, true
	case at.addr.IsValid() && len(p.Sources) > 0 && slices.Contains(p.LoadBalancerIPs, at.addr):
		external.restricted = true
	}
	return external, true
}

// class evaluates the chain of a class.
func (w *walk) class(chain string, c class, port *Port, at frontend) error {
	if c.restricted {
		if allowed, err := w.allowed(at); err != nil {
			return err
		} else if !allowed {
			w.end(chain, "from sources that are not allowed", w.f.set(kindSources).name(), fmt.Sprintf("dropped: %s is in none of the service's loadBalancerSourceRanges", w.p.From.Addr.Addr()))
			return nil
		}
	}
	where := "any node"
	switch c.action {
	case actReject:
		rule := "the others"
		if at.protocol == unix.IPPROTO_TCP {
			rule = "TCP"
		}
		w.end(chain, rule, "", "refused, because the service has no endpoints: "+refusalText(at.protocol))
		return nil
	case actDrop:
		w.end(chain, "no endpoint may be used here", "", "dropped: there are endpoints, but the traffic policy Local allows none of them here")
		return nil
	case actExternalLocal:
		if w.p.From.Place != trace.Outside && c.cluster > 0 {
			rule := "from a pod of this node"
			if w.p.From.Place == trace.Node {
				rule = "from the node itself"
			}
			w.add(chain, rule, "", "externalTrafficPolicy Local does not apply to connections from this node")
			k := byAddress
			if !at.addr.IsValid() {
				k = byNodePort
			}
			return w.class(c.internalClass().chain(w.f, k), c.internalClass(), port, at)
		}
		if c.local == 0 {
			w.end(chain, "no endpoint on this node", "", "dropped: externalTrafficPolicy is Local and no endpoint is here")
			return nil
		}
		where = "this node"
	case actLocal:
		where = "this node"
	}
	for _, pool := range c.pools() {
		return w.choose(chain, c, pool, where, port, at)
	}
	return nil
}

// choose evaluates the rules that choose an endpoint. If several endpoints are possible, it
// follows the first.
func (w *walk) choose(chain string, c class, pool pool, where string, port *Port, at frontend) error {
	set, key := kindEndpoints, destination(at)
	switch {
	case c.sticky != nil:
		set, key = kindStickyEndpoints, destination(c.sticky.service)
	case !at.addr.IsValid():
		set = kindNodeEndpoints
	}
	all := port.Cluster
	if pool.first == localIndexes {
		all = port.Local
	}
	var problems []string
	var endpoints []netip.AddrPort
	var names []string
	for i := range pool.count {
		val, ok, problem, err := w.get(set, key+number(pool.first+i))
		if err != nil {
			return err
		}
		problems = append(problems, problem)
		if !ok {
			continue
		}
		e := all[i]
		if c.sticky == nil {
			e = parseAddrPort(w.f, val)
		}
		endpoints, names = append(endpoints, e), append(names, e.String())
	}
	if len(endpoints) == 0 {
		w.end(chain, "its endpoints change at this moment", "", "dropped: no endpoint is in the kernel's set")
		w.steps[len(w.steps)-1].Problem = joinProblems(problems...)
		return nil
	}
	chosen, rule, why := endpoints[0], "one of the endpoints", fmt.Sprintf("%s of %s on %s", w.table.cfg.Scheduler, endpointCount(uint32(len(endpoints))), where)
	if c.sticky != nil {
		for _, e := range endpoints {
			key := string(w.p.From.Addr.Addr().AsSlice()) + destination(c.sticky.service) + string(e.Addr().AsSlice())
			if _, had, _, err := w.get(kindClients, key); err != nil {
				return err
			} else if had {
				chosen, rule, why = e, "was at "+e.String(), "session affinity: the client was there before"
				break
			}
		}
	}
	w.add(chain, rule, w.f.set(set).name()+": "+strings.Join(names, ", "),
		fmt.Sprintf("sent to an endpoint, %s; followed here: %s", why, chosen)).Problem = joinProblems(problems...)
	if c.sticky != nil {
		w.add(c.sticky.endpointChain(w.f, chosen), "send it to "+chosen.String(), "", fmt.Sprintf("the client comes back to it for %s", c.sticky.timeout))
	}
	w.p.To.Addr = chosen
	return nil
}

// allowed reports whether the kernel has a source range for a frontend that contains the
// client.
func (w *walk) allowed(at frontend) (bool, error) {
	id := w.f.set(kindSources)
	if _, _, err := w.lookup(id, ""); err != nil {
		return false, err
	}
	source, prefix := w.p.From.Addr.Addr(), destination(at)
	for key := range w.sets[id] {
		half := len(key) / 2
		if len(key) == 0 || key[:len(prefix)] != prefix {
			continue
		}
		first, _ := netip.AddrFromSlice([]byte(key[len(prefix):half]))
		last, _ := netip.AddrFromSlice([]byte(key[half+len(prefix):]))
		if !source.Less(first) && !last.Less(source) {
			return true, nil
		}
	}
	return false, nil
}

// source evaluates the chain postrouting.
func (w *walk) source() error {
	p := w.p
	if p.To.Place == trace.Node {
		return nil // the packet stays on the node
	}
	translated := p.Original != p.To.Addr
	from, to := p.From.Addr.Addr(), p.To.Addr.Addr()
	rule, effect := "", "keeps its source address: "
	switch {
	case translated && p.To.Place == trace.Pod && from == to:
		rule, effect = "a pod that reaches itself through a service", "gets the gateway's source address, or the pod would drop a packet from its own"
	case p.To.Place == trace.Pod:
		rule, effect = "to a pod of this machine", effect+"the answer passes here anyway"
	case !translated:
		rule, effect = "not through a service", effect+"it did not pass a service"
	default:
		for _, r := range w.table.cfg.ClusterRanges {
			switch {
			case r.Contains(from) && p.From.Place == trace.Outside:
				rule, effect = "from a pod of another node", "gets the node's source address, so that the answer comes back here"
			case r.Contains(from):
				rule, effect = "from a pod: "+r.String(), effect+"every node has a route to it"
			}
		}
		if rule != "" {
			break
		}
		rule, effect = "from outside to an endpoint elsewhere", "gets the node's source address, so that the answer comes back here"
	}
	w.add(chainPostrouting, rule, "", effect)
	return nil
}

func refusalText(protocol uint8) string {
	if protocol == unix.IPPROTO_TCP {
		return "the connection is reset at once"
	}
	return "the port is reported unreachable at once"
}

// text describes a class in words.
func (c class) text() string {
	var parts []string
	switch c.action {
	case actReject:
		parts = append(parts, "which has no endpoints")
	case actDrop:
		parts = append(parts, "which has no endpoint for this node")
	case actExternalLocal:
		parts = append(parts, fmt.Sprintf("externalTrafficPolicy Local, %s here, %d in all", endpointCount(c.local), c.cluster))
	case actLocal:
		parts = append(parts, fmt.Sprintf("internalTrafficPolicy Local, %s here", endpointCount(c.local)))
	case actCluster:
		parts = append(parts, endpointCount(c.cluster))
	}
	if c.sticky != nil {
		parts = append(parts, fmt.Sprintf("session affinity for %s", c.sticky.timeout))
	}
	if c.restricted {
		parts = append(parts, "for some sources only")
	}
	return strings.Join(parts, ", ")
}

func endpointCount(n uint32) string {
	if n == 1 {
		return "1 endpoint"
	}
	return fmt.Sprintf("%d endpoints", n)
}

func joinProblems(list ...string) string {
	return strings.Join(slices.Compact(slices.DeleteFunc(list, func(s string) bool { return s == "" })), "; ")
}

// text formats an element as nft does.
func (id setID) text(key, val string) string {
	f := id.family()
	switch id.kind {
	case kindServices, kindNodePorts:
		return parseFrontend(f, key).String() + " -> chain " + val
	case kindEndpoints, kindNodeEndpoints:
		end := len(key) - 4
		return fmt.Sprintf("%s no. %#x -> %s", parseFrontend(f, key[:end]), parseNumber(key[end:]), parseAddrPort(f, val))
	case kindStickyEndpoints:
		end := len(key) - 4
		return fmt.Sprintf("%s no. %#x -> chain %s", parseFrontend(f, key[:end]), parseNumber(key[end:]), val)
	case kindClusterIPs:
		a, _ := netip.AddrFromSlice([]byte(key))
		return a.String()
	}
	return fmt.Sprintf("%x -> %x", key, val)
}

// parseFrontend is the inverse of destination.
func parseFrontend(f family, key string) frontend {
	var at frontend
	if len(key) > 8 {
		at.addr, _ = netip.AddrFromSlice([]byte(key[:f.AddrLen]))
		key = key[f.AddrLen:]
	}
	at.protocol, at.port = key[0], uint16(key[4])<<8|uint16(key[5])
	return at
}

// parseAddrPort is the inverse of addrPort.
func parseAddrPort(f family, b string) netip.AddrPort {
	a, _ := netip.AddrFromSlice([]byte(b[:f.AddrLen]))
	return netip.AddrPortFrom(a, uint16(b[f.AddrLen])<<8|uint16(b[f.AddrLen+1]))
}
