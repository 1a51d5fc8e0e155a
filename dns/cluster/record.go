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

// record is everything that names of one service say. It is never changed.
type record struct {
	name      string // service and namespace in wire format: the part before "svc"
	alias     string // wire name that an ExternalName stands for, else ""
	headless  bool
	addrs     []netip.Addr // what the service's own name answers; of a headless one its endpoints'
	ports     []port       // the service's, or of a headless one its endpoints'
	endpoints []endpoint   // sorted by host, then address
}

// port is where something is reached.
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

// pointer is a reverse name's target: a host of a service, or the service itself.
type pointer struct {
	record   *record
	endpoint int32 // which of the record's, or itself
}

// itself is the endpoint of a pointer to a service.
const itself = -1

// host is the label of the endpoint in wire format, empty for the service.
func (p pointer) host() string {
	if p.endpoint == itself {
		return ""
	}
	return p.record.endpoints[p.endpoint].host
}

// newRecord makes the record of a service, or nil when it has no names.
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
		return nil // it has not got its address yet
	}
	return r
}

// externalName is the wire format of the name of an ExternalName service. Names that
// look like addresses have no records, as upstream documents it.
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

// endpoints lists those that may be named: ready ones, which includes unready ones of
// services with publishNotReadyAddresses, since the slices say ready then. An unset
// condition means ready. While endpoints move between slices both may have them.
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
				continue // all ports: not one that could be named
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

// addressLabel is the label of an endpoint without a hostname, as CoreDNS makes it:
// 10.42.0.5 is 10-42-0-5, and fd42::5 is fd42--5.
func addressLabel(a string) string {
	label := strings.NewReplacer(".", "-", ":", "-").Replace(a)
	if strings.HasSuffix(label, "-") { // fd42::
		label += "0"
	}
	return strings.ToLower(label)
}

// equal says whether two records answer alike.
func (r *record) equal(o *record) bool {
	if r == nil || o == nil {
		return r == o
	}
	return r.alias == o.alias && r.headless == o.headless && slices.Equal(r.addrs, o.addrs) &&
		slices.Equal(r.ports, o.ports) && slices.EqualFunc(r.endpoints, o.endpoints, endpoint.equal)
}

// pointers yields which addresses have reverse names because of the record, and
// to what of it they lead.
func (r *record) pointers() iter.Seq2[netip.Addr, pointer] {
	if r == nil {
		return maps.All[map[netip.Addr]pointer](nil)
	}
	return func(yield func(netip.Addr, pointer) bool) {
		if !r.headless {
			for _, a := range r.addrs {
				if !yield(a, pointer{r, itself}) {
					return
				}
			}
		}
		for i, e := range r.endpoints {
			if i > 0 && e.host == r.endpoints[i-1].host && e.addr == r.endpoints[i-1].addr {
				continue // the same with other ports
			}
			if !yield(e.addr, pointer{r, int32(i)}) {
				return
			}
		}
	}
}

// at returns the endpoints that have a host label, in wire format.
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

// compare is bytes.Compare without converting either side.
func compare(a string, b []byte) int {
	switch {
	case a == string(b):
		return 0
	case a < string(b):
		return -1
	}
	return 1
}
