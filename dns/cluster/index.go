package cluster

import (
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"kedge/dns/message"
)

// DefaultTTL is the TTL of answers in seconds, the same as CoreDNS's: endpoints change at
// any time, and clients are not notified.
const DefaultTTL = 5

// Config is the configuration of an index.
type Config struct {
	Domain  string         // "cluster.local"
	Servers []netip.Addr   // addresses of the cluster DNS
	Ranges  []netip.Prefix // of pods and services, whose reverse names belong to the index
	TTL     uint32         // of every record, in seconds
}

// Index has the cluster's names. It is safe for concurrent use.
type Index struct {
	cfg    Config
	zone   string // the domain in wire format
	svc    string // "svc" and the domain
	labels int    // of the domain
	soa    message.SOA

	events  sync.Mutex // serializes events; guards sources
	sources map[key]*source

	mu          sync.RWMutex // guards the data of queries; locked after events
	namespaces  map[string]bool
	services    map[string]*record // by service and namespace in wire format
	reverse     map[netip.Addr]pointer
	reverseMore map[netip.Addr][]pointer // further pointers, for the few addresses with several

	serial atomic.Uint32 // incremented with every change
}

type key struct{ namespace, name string }

// source has the API objects of a service. They are shared with the watches.
type source struct {
	service *corev1.Service
	slices  []*discoveryv1.EndpointSlice
	record  *record // the record made of them
}

// New returns an empty index of a valid domain.
func New(cfg Config) *Index {
	zone := message.WireName(cfg.Domain)
	cfg.Servers = slices.SortedFunc(slices.Values(cfg.Servers), netip.Addr.Compare)
	x := &Index{
		cfg: cfg, zone: zone, svc: "\x03svc" + zone, labels: message.CountLabels(zone),
		namespaces: map[string]bool{}, services: map[string]*record{},
		reverse: map[netip.Addr]pointer{}, reverseMore: map[netip.Addr][]pointer{}, sources: map[key]*source{},
	}
	x.soa = message.SOA{
		Server:  message.Name{"\x02ns\x03dns", zone},
		Mailbox: message.Name{"\x0ahostmaster", zone},
		Minimum: cfg.TTL,
	}
	return x
}

// SetService adds or updates a service.
func (x *Index) SetService(s *corev1.Service) {
	x.change(key{s.Namespace, s.Name}, func(src *source) { src.service = s })
}

// DeleteService removes a service.
func (x *Index) DeleteService(namespace, name string) {
	x.change(key{namespace, name}, func(src *source) { src.service = nil })
}

// SetSlice adds or updates an endpoint slice. A slice does not change its service.
func (x *Index) SetSlice(s *discoveryv1.EndpointSlice) {
	if s.AddressType == discoveryv1.AddressTypeFQDN || s.Labels[discoveryv1.LabelServiceName] == "" {
		return
	}
	x.change(key{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}, func(src *source) {
		if i := src.find(s.Name); i >= 0 {
			src.slices[i] = s
		} else {
			src.slices = append(src.slices, s)
		}
	})
}

// DeleteSlice removes an endpoint slice.
func (x *Index) DeleteSlice(s *discoveryv1.EndpointSlice) {
	x.change(key{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}, func(src *source) {
		if i := src.find(s.Name); i >= 0 {
			src.slices = slices.Delete(src.slices, i, i+1)
		}
	})
}

// find returns the index of the slice with a name, or a negative number.
func (src *source) find(name string) int {
	return slices.IndexFunc(src.slices, func(s *discoveryv1.EndpointSlice) bool { return s.Name == name })
}

// SetNamespace adds or removes a namespace.
func (x *Index) SetNamespace(name string, exists bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if exists {
		x.namespaces[name] = true
	} else {
		delete(x.namespaces, name)
	}
}

// change applies an event to a service and replaces its record. Queries wait only while the
// record is replaced, not while it is built.
func (x *Index) change(k key, apply func(*source)) {
	x.events.Lock()
	defer x.events.Unlock()
	src := x.sources[k]
	if src == nil {
		src = &source{}
		x.sources[k] = src
	}
	apply(src)
	if src.service == nil && len(src.slices) == 0 {
		delete(x.sources, k)
	}
	next := newRecord(k, src)
	if next.equal(src.record) {
		return // most updates of slices and services do not affect names
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.serial.Add(1)
	for a := range src.record.pointers() {
		x.removePointer(a, src.record)
	}
	for a, p := range next.pointers() {
		if _, several := x.reverse[a]; several {
			x.reverseMore[a] = append(x.reverseMore[a], p)
		} else {
			x.reverse[a] = p
		}
	}
	src.record = next
	if next != nil {
		x.services[next.name] = next
	} else {
		delete(x.services, wireKey(k))
	}
}

// removePointer removes a record's pointers from an address.
func (x *Index) removePointer(a netip.Addr, r *record) {
	var left []pointer
	for _, p := range x.pointersOf(a, nil) {
		if p.record != r {
			left = append(left, p)
		}
	}
	delete(x.reverse, a)
	delete(x.reverseMore, a)
	if len(left) > 0 {
		x.reverse[a] = left[0]
	}
	if len(left) > 1 {
		x.reverseMore[a] = left[1:]
	}
}

// pointersOf appends the pointers of an address. Caller holds mu.
func (x *Index) pointersOf(a netip.Addr, to []pointer) []pointer {
	if first, ok := x.reverse[a]; ok {
		to = append(append(to, first), x.reverseMore[a]...)
	}
	return to
}

// Services returns the number of services with names.
func (x *Index) Services() int {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return len(x.services)
}

// wireKey returns service and namespace in wire format.
func wireKey(k key) string { return wireLabel(k.name) + wireLabel(k.namespace) }

// wireLabel returns one label in wire format.
func wireLabel(s string) string { return string([]byte{byte(len(s))}) + s }
