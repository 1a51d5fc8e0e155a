// Package watched says what a node keeps of the objects that it watches: as much as its
// proxy, policies, resolver and load balancer read. A node knows all pods, services and
// endpoints of the cluster, so that what nobody reads would be most of its memory.
//
// It is for copies that are only read: what was dropped would be lost if such an object
// were written back. Package agent and programs that stand for a part of it may import it.
package watched

import (
	"maps"
	"slices"
	"strings"
	"unique"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Prefixes of names.
const (
	ownAnnotations = "kedge.io/" // by which nodes tell each other things
	serviceLabels  = "service.kubernetes.io/"
)

// Reduce drops what no reader on a node needs. It is for informers, which call it before
// anybody else knows the object, and changes it in place. It never fails.
func Reduce(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		reducePod(o)
	case *corev1.Service:
		reduceService(o)
	case *discoveryv1.EndpointSlice:
		reduceSlice(o)
	case *corev1.Node:
		maps.DeleteFunc(o.Annotations, func(key, _ string) bool { return !strings.HasPrefix(key, ownAnnotations) })
		o.Status = corev1.NodeStatus{Addresses: o.Status.Addresses, Conditions: o.Status.Conditions}
	}
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
		m.SetNamespace(same(m.GetNamespace()))
	}
	return obj, nil
}

// reducePod keeps who the pod is, where it runs, its addresses and its named ports,
// and of a static pod's image the name under which the kubelet runs it.
func reducePod(p *corev1.Pod) {
	ports := func(all []corev1.Container) (out []corev1.Container) {
		for _, c := range all {
			if len(c.Ports) > 0 {
				out = append(out, corev1.Container{Name: same(c.Name), Ports: exact(c.Ports), RestartPolicy: c.RestartPolicy})
			}
		}
		return out
	}
	var annotations map[string]string
	if static, ok := p.Annotations[corev1.MirrorPodAnnotationKey]; ok {
		annotations = map[string]string{corev1.MirrorPodAnnotationKey: static}
	}
	p.Annotations, p.OwnerReferences, p.Finalizers = annotations, nil, nil
	p.GenerateName, p.Labels = "", shared(p.Labels)
	p.Spec = corev1.PodSpec{
		NodeName: same(p.Spec.NodeName), HostNetwork: p.Spec.HostNetwork,
		Containers: ports(p.Spec.Containers), InitContainers: ports(p.Spec.InitContainers),
	}
	p.Status = corev1.PodStatus{Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: exact(p.Status.PodIPs)}
}

// reduceService keeps what is said of addresses and ports, and the annotations that
// change how they are used; whom a service selects is in its slices.
func reduceService(s *corev1.Service) {
	s.OwnerReferences, s.Finalizers, s.Spec.Selector = nil, nil, nil
	s.Labels = only(s.Labels, func(key string) bool { return strings.HasPrefix(key, serviceLabels) })
	s.Annotations = only(s.Annotations, func(key string) bool { return key != corev1.LastAppliedConfigAnnotation })
	s.Spec.Ports = exact(s.Spec.Ports)
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		p.Name, p.Protocol = same(p.Name), corev1.Protocol(same(string(p.Protocol)))
	}
}

// reduceSlice keeps which endpoints there are and of what service. Which pods they are,
// nobody asks: they are known by their addresses.
func reduceSlice(s *discoveryv1.EndpointSlice) {
	s.OwnerReferences, s.Finalizers, s.GenerateName = nil, nil, ""
	s.Labels = only(s.Labels, func(key string) bool {
		return key == discoveryv1.LabelServiceName || strings.HasPrefix(key, serviceLabels)
	})
	s.Annotations = only(s.Annotations, func(key string) bool { return key == corev1.EndpointsLastChangeTriggerTime })
	s.Endpoints = exact(s.Endpoints)
	var node, zone *string // most endpoints have those of the one before
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		e.TargetRef, e.DeprecatedTopology = nil, nil
		e.Addresses = exact(e.Addresses)
		node, zone = sameAs(node, e.NodeName), sameAs(zone, e.Zone)
		e.NodeName, e.Zone = node, zone
	}
	s.Ports = exact(s.Ports)
	for i := range s.Ports {
		s.Ports[i].Name = sameAs(nil, s.Ports[i].Name)
	}
}

// only is a map with the keys that somebody reads, or nil.
func only(m map[string]string, read func(key string) bool) map[string]string {
	var out map[string]string
	for key, value := range m {
		if read(key) {
			if out == nil {
				out = map[string]string{}
			}
			out[same(key)] = value
		}
	}
	return out
}

// shared is a map whose keys and values many objects have.
func shared(m map[string]string) map[string]string {
	if m == nil {
		return nil
	}
	out := make(map[string]string, len(m))
	for key, value := range m {
		out[same(key)] = same(value)
	}
	return out
}

// same is the string, in memory once for all objects that have it.
func same(s string) string { return unique.Make(s).Value() }

// sameAs is the pointer that an endpoint before had, if it points to the same.
func sameAs(before, now *string) *string {
	if before != nil && now != nil && *before == *now {
		return before
	}
	if now != nil {
		*now = same(*now)
	}
	return now
}

// exact is the list without room for more: decoders leave some.
func exact[T any](list []T) []T {
	if cap(list) == len(list) {
		return list
	}
	return slices.Clone(list)
}
