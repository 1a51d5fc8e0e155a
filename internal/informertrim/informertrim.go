// Package informertrim trims objects in the caches of a node's informers to the fields that
// its proxy, policies, resolver and load balancer read. A node watches all pods, services and
// endpoints of the cluster, and the other fields would be most of its memory.
//
// Trimmed objects are for reading only: writing one back would delete the dropped fields.
// Package agent and programs that stand for a part of it may import it.
package informertrim

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
	ownAnnotations = "kedge.io/" // nodes tell each other their settings by them
	serviceLabels  = "service.kubernetes.io/"
)

// Transform is a cache.TransformFunc that drops fields which no reader on a node needs. It
// changes the object in place: informers call it before they hand the object out. It never
// fails.
func Transform(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		trimPod(o)
	case *corev1.Service:
		trimService(o)
	case *discoveryv1.EndpointSlice:
		trimSlice(o)
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

// trimPod keeps the pod's name and labels, its node, its addresses and ports, and the
// annotation of a mirror pod with the name under which the kubelet runs the static pod.
func trimPod(p *corev1.Pod) {
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

// trimService keeps addresses and ports, and the annotations that change their use. The
// selected pods are in the service's slices.
func trimService(s *corev1.Service) {
	s.OwnerReferences, s.Finalizers, s.Spec.Selector = nil, nil, nil
	s.Labels = only(s.Labels, func(key string) bool { return strings.HasPrefix(key, serviceLabels) })
	s.Annotations = only(s.Annotations, func(key string) bool { return key != corev1.LastAppliedConfigAnnotation })
	s.Spec.Ports = exact(s.Spec.Ports)
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		p.Name, p.Protocol = same(p.Name), corev1.Protocol(same(string(p.Protocol)))
	}
}

// trimSlice keeps the endpoints and the name of their service. The references to pods are
// dropped: readers know endpoints by their addresses.
func trimSlice(s *discoveryv1.EndpointSlice) {
	s.OwnerReferences, s.Finalizers, s.GenerateName = nil, nil, ""
	s.Labels = only(s.Labels, func(key string) bool {
		return key == discoveryv1.LabelServiceName || strings.HasPrefix(key, serviceLabels)
	})
	s.Annotations = only(s.Annotations, func(key string) bool { return key == corev1.EndpointsLastChangeTriggerTime })
	s.Endpoints = exact(s.Endpoints)
	var node, zone *string // most endpoints have those of the endpoint before
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

// only is a map with the keys for which read returns true, or nil.
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

// shared is a copy of a map whose keys and values many objects have.
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

// same is the string, stored once for all objects that have it.
func same(s string) string { return unique.Make(s).Value() }

// sameAs is the pointer of the endpoint before, if both point to equal strings.
func sameAs(before, now *string) *string {
	if before != nil && now != nil && *before == *now {
		return before
	}
	if now != nil {
		*now = same(*now)
	}
	return now
}

// exact is the list without spare capacity: decoders leave some.
func exact[T any](list []T) []T {
	if cap(list) == len(list) {
		return list
	}
	return slices.Clone(list)
}
