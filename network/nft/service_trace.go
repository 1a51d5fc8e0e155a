package nft

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/network/trace"
)

// Trace implements trace.Part: it reads the sets from the kernel and does what
// the rules would.
func (t *ServiceTable) Trace(_ context.Context, stage trace.Stage, p *trace.Packet) ([]trace.Step, error) {
	if stage == trace.Filter {
		return nil, nil // no rule of ours is there
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	v := &kernelView{table: t, sets: map[setID]map[string]string{}}
	var err error
	if v.chains, err = comments(t.name); err != nil {
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

// kernelView is what the kernel has, read as far as needed.
type kernelView struct {
	table  *ServiceTable
	chains map[string][]string // comments of rules
	sets   map[setID]map[string]string
}

func (v *kernelView) lookup(id setID, key string) (string, bool, error) {
	if v.sets[id] == nil {
		conn, err := v.table.open()
		if err != nil {
			return "", false, err
		}
		list, err := conn.GetSetElements(id.describe().of(v.table.table()))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			v.table.hangUp()
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

// add notes a step, and whether the rule that makes it is there.
func (w *walk) add(chain, rule, element, effect string) *trace.Step {
	s := trace.Step{Table: w.table.name, Chain: chain, Rule: rule, Element: element, Effect: effect}
	if !slices.Contains(w.chains[chain], rule) {
		s.Problem = "the kernel does not have this rule"
	}
	w.steps = append(w.steps, s)
	return &w.steps[len(w.steps)-1]
}

func (w *walk) end(chain, rule, element, effect string) {
	w.add(chain, rule, element, effect)
	w.p.Ended = true
}

// get looks a key up in the kernel, and notes where it should be otherwise.
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

// destination does what the chains prerouting and output do.
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
	at := frontend{addr: to, protocol: p.Protocol, port: p.To.Addr.Port()}
	found, err := w.decide("addresses of services", kindServices, at)
	if found || err != nil {
		return err
	}
	for _, r := range cfg.NodePortsOn {
		if p.To.Place != trace.Node || !r.Contains(to) || w.f.loopback.Contains(to) {
			continue
		}
		at := frontend{protocol: p.Protocol, port: at.port}
		if found, err := w.decide("node ports at "+r.String(), kindNodePorts, at); found || err != nil {
			return err
		}
	}
	_, ours, problem, err := w.get(kindClusterIPs, string(to.AsSlice()))
	if err != nil {
		return err
	}
	if ours && p.To.Place != trace.Node {
		s := w.add(chainServices, "other ports of cluster IPs", w.f.set(kindClusterIPs).name()+": "+to.String(), "a cluster IP, but not a port that its service has")
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
	w.steps[len(w.steps)-1].Effect += "; it is for none of them"
	w.steps[len(w.steps)-1].Problem += problem
	return nil
}

// decide does what the rule does that looks up the class of a frontend.
func (w *walk) decide(rule string, k setKind, at frontend) (bool, error) {
	id := w.f.set(k)
	val, ok, problem, err := w.get(k, destination(at))
	if err != nil || (!ok && problem == "") {
		return false, err
	}
	if !ok {
		w.add(chainServices, rule, "", "nothing: the element of "+at.String()+" is missing").Problem = problem
		return false, nil
	}
	c := w.table.classes[val]
	chain, ok, missing, err := w.get(kindClasses, val)
	if err != nil {
		return false, err
	}
	holder := "somebody"
	if h := w.table.holders[frontend{addr: at.addr, is6: w.f.proto == unix.NFPROTO_IPV6, protocol: at.protocol, port: at.port}]; len(h) > 0 {
		holder = h[0]
	}
	s := w.add(chainServices, rule, id.name()+": "+id.text(destination(at), val), fmt.Sprintf("%s of service %s, %s", at, holder, c.text()))
	s.Problem = joinProblems(s.Problem, problem, missing)
	if !ok {
		return false, nil
	}
	return true, w.class(chain, c, k, at)
}

// class does what the chain of a class does.
func (w *walk) class(chain string, c class, k setKind, at frontend) error {
	if c.do&actRestricted != 0 {
		if allowed, err := w.allowed(at); err != nil {
			return err
		} else if !allowed {
			w.end(chain, "from sources that are not allowed", w.f.set(kindSources).name(), fmt.Sprintf("dropped: %s is in none of the service's loadBalancerSourceRanges", w.p.From.Addr.Addr()))
			return nil
		}
	}
	service := destination(at)
	pool, count, first := "any node", c.cluster, uint32(0)
	switch c.do &^ actRestricted {
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
	case actExternalLocal, actNodePortLocal:
		if w.p.From.Place != trace.Outside && c.cluster > 0 {
			rule := "from a pod of this node"
			if w.p.From.Place == trace.Node {
				rule = "from the node itself"
			}
			inside := c.fromInside()
			w.add(chain, rule, "", "externalTrafficPolicy Local does not bind connections from this node")
			return w.class(inside.chain(w.f), inside, k, at)
		}
		pool, count, first = "this node", c.local, localPlaces
		if c.local == 0 {
			w.end(chain, "no endpoint on this node", "", "dropped: externalTrafficPolicy is Local and no endpoint is here")
			return nil
		}
	case actInternalLocal:
		pool, count, first = "this node", c.local, localPlaces
	}
	var problems []string
	if behind := behindKind(c.do); behind != 0 {
		ip, ok, problem, err := w.get(behind, destination(at))
		if err != nil {
			return err
		}
		port := string(portBytes(at.port))
		if ok && behind == kindBehindNode {
			var missing string
			if port, ok, missing, err = w.get(kindPortBehind, destination(at)); err != nil {
				return err
			}
			problem = joinProblems(problem, missing)
		}
		problems = append(problems, problem)
		if !ok {
			w.end(chain, "its endpoints change at this moment", "", "dropped: the element that leads to the service is missing")
			w.steps[len(w.steps)-1].Problem = problem
			return nil
		}
		service = ip + string(word(at.protocol)) + string(word([]byte(port)[:2]...))
	}
	var endpoints []netip.AddrPort
	for i := range count {
		val, ok, problem, err := w.get(kindEndpoints, service+number(first+i))
		if err != nil {
			return err
		}
		problems = append(problems, problem)
		if ok {
			endpoints = append(endpoints, parseAddrPort(w.f, val))
		}
	}
	if len(endpoints) == 0 {
		w.end(chain, "its endpoints change at this moment", "", "dropped: no endpoint is in the kernel's set")
		w.steps[len(w.steps)-1].Problem = joinProblems(problems...)
		return nil
	}
	chosen, rule, why := endpoints[0], "one of the endpoints", fmt.Sprintf("%s of %d endpoints on %s", w.table.cfg.Scheduler, len(endpoints), pool)
	if c.sticky > 0 {
		rule = "one of the endpoints, from now on this client's"
		had, ok, _, err := w.get(kindClients, string(w.p.From.Addr.Addr().AsSlice())+service)
		if err != nil {
			return err
		}
		for _, e := range endpoints {
			if ok && string(e.Addr().AsSlice()) == had {
				chosen, rule = e, "the endpoint that the client had, if it is still one"
				why = "session affinity: the client was there before"
			}
		}
	}
	var names []string
	for _, e := range endpoints {
		names = append(names, e.String())
	}
	w.add(chain, rule, w.f.set(kindEndpoints).name()+": "+strings.Join(names, ", "),
		fmt.Sprintf("sent to an endpoint, %s; followed here: %s", why, chosen)).Problem = joinProblems(problems...)
	w.p.To.Addr = chosen
	return nil
}

func behindKind(a action) setKind {
	switch a &^ actRestricted {
	case actExternal, actExternalLocal:
		return kindBehindAddress
	case actNodePort, actNodePortLocal:
		return kindBehindNode
	}
	return 0
}

// allowed says whether the kernel has a range for a frontend with the source in it.
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

// source does what the chain postrouting does.
func (w *walk) source() error {
	p := w.p
	if p.To.Place == trace.Node {
		return nil // does not leave
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
			if r.Contains(from) {
				rule, effect = "from a pod: "+r.String(), effect+"every node has a route to it"
			}
		}
		if rule != "" {
			break
		}
		rule = "from outside through a node port"
		for _, k := range []setKind{kindClusterIPs, kindExternalIPs} {
			if _, ok, _, err := w.get(k, string(p.Original.Addr().AsSlice())); err != nil {
				return err
			} else if ok {
				rule = "from outside through one of " + w.f.set(k).name()
				break
			}
		}
		effect = "gets the node's source address, so that the answer comes back here"
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

// text says in words what a class does.
func (c class) text() string {
	var parts []string
	switch c.do &^ actRestricted {
	case actReject:
		parts = append(parts, "which has no endpoints")
	case actDrop:
		parts = append(parts, "which has no endpoint for this node")
	case actExternalLocal, actNodePortLocal:
		parts = append(parts, fmt.Sprintf("externalTrafficPolicy Local, %d endpoints here, %d in all", c.local, c.cluster))
	case actInternalLocal:
		parts = append(parts, fmt.Sprintf("internalTrafficPolicy Local, %d endpoints here", c.local))
	default:
		parts = append(parts, fmt.Sprintf("%d endpoints", c.cluster))
	}
	if c.sticky > 0 {
		parts = append(parts, fmt.Sprintf("session affinity for %ds", c.sticky))
	}
	if c.do&actRestricted != 0 {
		parts = append(parts, "for some sources only")
	}
	return strings.Join(parts, ", ")
}

func joinProblems(list ...string) string {
	return strings.Join(slices.Compact(slices.DeleteFunc(list, func(s string) bool { return s == "" })), "; ")
}

// text writes an element as nft does.
func (id setID) text(key, val string) string {
	f := id.family()
	switch id.kind {
	case kindServices, kindNodePorts:
		return parseFrontend(f, key).String() + " -> " + strings.TrimRight(val, "\x00")
	case kindBehindAddress, kindBehindNode:
		a, _ := netip.AddrFromSlice([]byte(val))
		return parseFrontend(f, key).String() + " -> " + a.String()
	case kindEndpoints:
		end := len(key) - 4
		return fmt.Sprintf("%s no. %#x -> %s", parseFrontend(f, key[:end]), parseNumber(key[end:]), parseAddrPort(f, val))
	case kindClusterIPs:
		a, _ := netip.AddrFromSlice([]byte(key))
		return a.String()
	case kindClasses:
		return strings.TrimRight(key, "\x00") + " -> " + val
	}
	return fmt.Sprintf("%x -> %x", key, val)
}

// parseFrontend reads what destination wrote.
func parseFrontend(f family, key string) frontend {
	var at frontend
	if len(key) > 8 {
		at.addr, _ = netip.AddrFromSlice([]byte(key[:f.addrLen]))
		key = key[f.addrLen:]
	}
	at.protocol, at.port = key[0], uint16(key[4])<<8|uint16(key[5])
	return at
}

// parseAddrPort reads what addrPort wrote.
func parseAddrPort(f family, b string) netip.AddrPort {
	a, _ := netip.AddrFromSlice([]byte(b[:f.addrLen]))
	return netip.AddrPortFrom(a, uint16(b[f.addrLen])<<8|uint16(b[f.addrLen+1]))
}
