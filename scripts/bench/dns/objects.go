package main

import (
	"fmt"
	"math/rand/v2"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func namespace(name string) corev1.Namespace {
	return corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1"}}
}

// many returns a cluster of n services with three endpoints each; one in ten is headless.
func many(n int) objects {
	o := objects{namespaces: []corev1.Namespace{namespace("default"), namespace("kube-system")}}
	ready := true
	tcp := corev1.ProtocolTCP
	portName, number := "http", int32(8080)
	for i := range n {
		name := fmt.Sprintf("svc-%d", i)
		ip := fmt.Sprintf("10.43.%d.%d", 1+i/250, 1+i%250)
		if i%10 == 9 {
			ip = corev1.ClusterIPNone
		}
		o.services = append(o.services, corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", ResourceVersion: "1", UID: "0f0e0d0c-0b0a-0908-0706-050403020100", Labels: map[string]string{"app": name}},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, Selector: map[string]string{"app": name},
				Ports: []corev1.ServicePort{{Name: "http", Protocol: tcp, Port: 80}},
			},
		})
		s := discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Name: name + "-abcde", Namespace: "default", ResourceVersion: "1",
				Labels: map[string]string{discoveryv1.LabelServiceName: name, "app": name}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Ports:       []discoveryv1.EndpointPort{{Name: &portName, Protocol: &tcp, Port: &number}},
		}
		for j := range 3 {
			k := 3*i + j
			pod := fmt.Sprintf("%s-%d", name, j)
			node := "node-1"
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
				Addresses: []string{fmt.Sprintf("10.42.%d.%d", k/250, 1+k%250)}, Conditions: discoveryv1.EndpointConditions{Ready: &ready},
				NodeName: &node, TargetRef: &corev1.ObjectReference{Kind: "Pod", Name: pod, Namespace: "default"},
			})
		}
		o.slices = append(o.slices, s)
	}
	return o
}

// varied returns a small cluster with random services of every kind.
func varied(rng *rand.Rand) objects {
	o := objects{namespaces: []corev1.Namespace{namespace("default"), namespace("other"), namespace("kube-system")}}
	pick := func(from ...string) string { return from[rng.IntN(len(from))] }
	protocols := []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}
	for i := range 30 {
		s := corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("svc-%d", i), Namespace: pick("default", "other"), ResourceVersion: "1"}}
		if i == 0 { // the benchmark waits for this service
			s.Namespace = "default"
		}
		kind := rng.IntN(4)
		if i == 0 {
			kind = 0
		}
		for j := range rng.IntN(3) {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprintf("p%d", j), Protocol: protocols[rng.IntN(3)], Port: int32(80 + j)})
		}
		if len(s.Spec.Ports) == 0 && kind < 2 {
			s.Spec.Ports = []corev1.ServicePort{{Name: "only", Protocol: corev1.ProtocolTCP, Port: 80}}
		}
		switch kind {
		case 0:
			s.Spec.ClusterIPs = []string{fmt.Sprintf("10.43.1.%d", i+1)}
		case 1:
			s.Spec.ClusterIPs = []string{fmt.Sprintf("10.43.1.%d", i+1), fmt.Sprintf("fd43::%x", i+1)}
		case 2:
			s.Spec.ClusterIPs = []string{corev1.ClusterIPNone}
		case 3:
			s.Spec.Type = corev1.ServiceTypeExternalName
			s.Spec.ExternalName = pick("www.example.com", "svc-0.default.svc.cluster.local", "Mixed.Example.com")
		}
		if kind < 3 {
			s.Spec.Type, s.Spec.ClusterIP = corev1.ServiceTypeClusterIP, s.Spec.ClusterIPs[0]
		}
		o.services = append(o.services, s)
		if kind == 3 {
			continue
		}
		for j := range rng.IntN(3) {
			o.slices = append(o.slices, variedSlice(rng, s, i, j))
		}
	}
	return o
}

func variedSlice(rng *rand.Rand, s corev1.Service, i, j int) discoveryv1.EndpointSlice {
	sl := discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s-%d", s.Name, j), Namespace: s.Namespace, ResourceVersion: "1",
			Labels: map[string]string{discoveryv1.LabelServiceName: s.Name}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	if rng.IntN(3) == 0 {
		sl.AddressType = discoveryv1.AddressTypeIPv6
	}
	for _, p := range s.Spec.Ports {
		number := p.Port + 8000
		sl.Ports = append(sl.Ports, discoveryv1.EndpointPort{Name: &p.Name, Protocol: &p.Protocol, Port: &number})
	}
	for k := range rng.IntN(4) {
		e := discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.42.%d.%d", i, 10*j+k)}}
		if sl.AddressType == discoveryv1.AddressTypeIPv6 {
			e.Addresses = []string{fmt.Sprintf("fd42::%x:%x", i+1, 10*j+k+1)}
		}
		if rng.IntN(2) == 0 {
			host := fmt.Sprintf("%s-%d", s.Name, k)
			e.Hostname = &host
		}
		switch rng.IntN(4) {
		case 0:
			ready := false
			e.Conditions.Ready = &ready
		case 1:
			ready := true
			e.Conditions.Ready = &ready
		}
		sl.Endpoints = append(sl.Endpoints, e)
	}
	return sl
}
