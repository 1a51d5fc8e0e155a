package agent

import (
	"context"
	"fmt"
	"maps"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Watches is the component that keeps the node's copies of what the API says
// about services, pods and policies. Proxy, policy and resolver share them: an
// object is held once on a node, and without what none of them reads.
type Watches struct {
	client    kubernetes.Interface
	informers informers.SharedInformerFactory
}

// NewWatches makes the component; nothing is watched before Run.
func NewWatches(client *rest.Config) (*Watches, error) {
	c, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("make the client of the node's network: %w", err)
	}
	return &Watches{
		client:    c,
		informers: informers.NewSharedInformerFactoryWithOptions(c, 0, informers.WithTransform(reduce)),
	}, nil
}

// Name implements lifecycle.Component.
func (w *Watches) Name() string { return "watches" }

// Informers returns what is watched. Whoever wants a kind asks for its informer
// before Run. Objects are shared and must not be changed.
func (w *Watches) Informers() informers.SharedInformerFactory { return w.informers }

// Client returns the client that the watches use, for what must be written.
func (w *Watches) Client() kubernetes.Interface { return w.client }

// Run implements lifecycle.Component. It is ready when every kind has been read once.
func (w *Watches) Run(ctx context.Context, ready func()) error {
	w.informers.StartWithContext(ctx)
	if err := w.informers.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("read what the API says of the network: %w", err)
	}
	ready()
	<-ctx.Done()
	w.informers.Shutdown()
	return nil
}

// ownAnnotations is how annotations begin by which nodes tell each other things.
const ownAnnotations = "kedge.io/"

// reduce drops what no reader on a node needs. A pod's specification alone is
// several kilobytes, and there are thousands of pods.
func reduce(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		reducePod(o)
	case *corev1.Node:
		maps.DeleteFunc(o.Annotations, func(key, _ string) bool { return !strings.HasPrefix(key, ownAnnotations) })
		o.Status = corev1.NodeStatus{Addresses: o.Status.Addresses, Conditions: o.Status.Conditions}
	}
	if m, ok := obj.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	return obj, nil
}

// reducePod keeps who the pod is, where it runs, its addresses and its named ports,
// and of a static pod's image the name under which the kubelet runs it.
func reducePod(p *corev1.Pod) {
	ports := func(all []corev1.Container) (out []corev1.Container) {
		for _, c := range all {
			if len(c.Ports) > 0 {
				out = append(out, corev1.Container{Name: c.Name, Ports: c.Ports, RestartPolicy: c.RestartPolicy})
			}
		}
		return out
	}
	var annotations map[string]string
	if static, ok := p.Annotations[corev1.MirrorPodAnnotationKey]; ok {
		annotations = map[string]string{corev1.MirrorPodAnnotationKey: static}
	}
	p.Annotations, p.OwnerReferences, p.Finalizers = annotations, nil, nil
	p.Spec = corev1.PodSpec{
		NodeName: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork,
		Hostname: p.Spec.Hostname, Subdomain: p.Spec.Subdomain,
		Containers: ports(p.Spec.Containers), InitContainers: ports(p.Spec.InitContainers),
	}
	p.Status = corev1.PodStatus{
		Phase: p.Status.Phase, Conditions: p.Status.Conditions,
		PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs, HostIP: p.Status.HostIP, HostIPs: p.Status.HostIPs,
	}
}
