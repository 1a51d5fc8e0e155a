package cluster

import (
	"cmp"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"kedge/dns/message"
)

// record has all data for the names of one service. It is immutable.
type record struct {
	name      string // service and namespace in wire format: the part before "svc"
	alias     string // target of an ExternalName service in wire format, else ""
	headless  bool
	addrs     []netip.Addr // cluster IPs, or of a headless service the addresses of endpoints
	ports     []port       // of the service, or of a headless service those of its endpoints
	endpoints []endpoint   // sorted by host, then address
}

// port is a port of a service or endpoint.
type port struct {
	name     string // lower case; may be empty
	protocol string // "tcp", "udp" or "sctp"
	number   uint16
}

// endpoint is one address behind a service.
type endpoint struct {
	host  string // its label in wire format, lower case
	addr  netip.Addr
	ports []port // shared by the endpoints of a slice
}

// pointer is the target of a reverse name: a host of a service, or the service itself.
type pointer struct {
	record   *record
	endpoint int32 // index in the record's endpoints, or serviceItself
}

// serviceItself is the endpoint of a pointer to a service.
const serviceItself = -1

// host returns the label of the endpoint in wire format, empty for the service.
func (p pointer) host() string {
	if p.endpoint == serviceItself {
		return ""
	}
	return p.record.endpoints[p.endpoint].host
}

// newRecord returns the record of a service, or nil if it has no names.
func newRecord(k key, src *source) *record {
	s := src.service
	if s == nil {
		return nil
	}
	r := &record{name: wireKey(k)}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		r.alias = externalName(s.Spec.ExternalName)
		if r.alias == "" {
			return nil
		}
		return r
	}
	r.endpoints = endpoints(src.slices)
	r.headless = s.Spec.ClusterIP == corev1.ClusterIPNone
	if r.headless {
		for _, e := range r.endpoints {
			r.addrs = append(r.addrs, e.addr)
			for _, p := range e.ports {
				if !slices.Contains(r.ports, p) {
					r.ports = append(r.ports, p)
				}
			}
		}
		slices.SortFunc(r.addrs, netip.Addr.Compare)
		r.addrs = slices.Compact(r.addrs)
		return r
	}
	for _, ip := range s.Spec.ClusterIPs {
		if a, err := netip.ParseAddr(ip); err == nil {
			r.addrs = append(r.addrs, a)
		}
	}
	slices.SortFunc(r.addrs, netip.Addr.Compare)
	for _, p := range s.Spec.Ports {
		r.ports = append(r.ports, port{strings.ToLower(p.Name), strings.ToLower(string(p.Protocol)), uint16(p.Port)})
	}
	if len(r.addrs) == 0 && len(r.endpoints) == 0 {
		return nil // the service has no address yet
	}
	return r
}

// externalName returns the target of an ExternalName service in wire format. Targets that
// look like addresses have no records, as upstream documents.
func externalName(name string) string {
	if _, err := netip.ParseAddr(name); err == nil {
		return ""
	}
	wire := message.WireName(name)
	if len(wire) <= 1 {
		return ""
	}
	return wire
}

// endpoints returns the endpoints that have names: ready ones, including those of services
// with publishNotReadyAddresses, which slices report as ready. An unset condition means
// ready. While endpoints move between slices, both slices may have them.
func endpoints(all []*discoveryv1.EndpointSlice) []endpoint {
	n := 0
	for _, s := range all {
		n += len(s.Endpoints)
	}
	if n == 0 {
		return nil
	}
	out := make([]endpoint, 0, n) // an endpoint has one address
	for _, s := range all {
		var ports []port
		for _, p := range s.Ports {
			if p.Port == nil {
				continue // all ports, which have no name
			}
			var name, protocol string
			if p.Name != nil {
				name = *p.Name
			}
			if p.Protocol != nil {
				protocol = string(*p.Protocol)
			}
			ports = append(ports, port{strings.ToLower(name), strings.ToLower(cmp.Or(protocol, "TCP")), uint16(*p.Port)})
		}
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, text := range e.Addresses {
				a, err := netip.ParseAddr(text)
				if err != nil {
					continue
				}
				host := addressLabel(text)
				if e.Hostname != nil && *e.Hostname != "" {
					host = strings.ToLower(*e.Hostname)
				}
				out = append(out, endpoint{host: wireLabel(host), addr: a, ports: ports})
			}
		}
	}
	slices.SortFunc(out, func(a, b endpoint) int {
		return cmp.Or(strings.Compare(a.host, b.host), a.addr.Compare(b.addr), slices.CompareFunc(a.ports, b.ports, comparePorts))
	})
	return slices.CompactFunc(out, endpoint.equal)
}

func (e endpoint) equal(o endpoint) bool {
	return e.host == o.host && e.addr == o.addr && slices.Equal(e.ports, o.ports)
}

func comparePorts(a, b port) int {
	return cmp.Or(strings.Compare(a.name, b.name), strings.Compare(a.protocol, b.protocol), cmp.Compare(a.number, b.number))
}

// addressLabel returns the label of an endpoint without a hostname, in CoreDNS's form:
// 10.42.0.5 is 10-42-0-5, and fd42::5 is fd42--5.
func addressLabel(a string) string {
	label := strings.NewReplacer(".", "-", ":", "-").Replace(a)
	if strings.HasSuffix(label, "-") { // fd42::
		label += "0"
	}
	return strings.ToLower(label)
}

// equal reports whether two records give the same answers.
func (r *record) equal(o *record) bool {
	if r == nil || o == nil {
		return r == o
	}
	return r.alias == o.alias && r.headless == o.headless && slices.Equal(r.addrs, o.addrs) &&
		slices.Equal(r.ports, o.ports) && slices.EqualFunc(r.endpoints, o.endpoints, endpoint.equal)
}

// pointers yields the addresses that have a reverse name because of the record, each with
// its pointer.
func (r *record) pointers() iter.Seq2[netip.Addr, pointer] {
	if r == nil {
		return maps.All[map[netip.Addr]pointer](nil)
	}
	return func(yield func(netip.Addr, pointer) bool) {
		if !r.headless {
			for _, a := range r.addrs {
				if !yield(a, pointer{r, serviceItself}) {
					return
				}
			}
		}
		for i, e := range r.endpoints {
			if i > 0 && e.host == r.endpoints[i-1].host && e.addr == r.endpoints[i-1].addr {
				continue // the same address with other ports
			}
			if !yield(e.addr, pointer{r, int32(i)}) {
				return
			}
		}
	}
}

// at returns the endpoints with a host label, in wire format.
func (r *record) at(host []byte) []endpoint {
	first, found := slices.BinarySearchFunc(r.endpoints, host, func(e endpoint, h []byte) int { return compare(e.host, h) })
	if !found {
		return nil
	}
	last := first + 1
	for last < len(r.endpoints) && r.endpoints[last].host == string(host) {
		last++
	}
	return r.endpoints[first:last]
}

// compare is bytes.Compare without a conversion.
func compare(a string, b []byte) int {
	switch {
	case a == string(b):
		return 0
	case a < string(b):
		return -1
	}
	return 1
}
