package watches

import (
	"fmt"
	"net"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/cache"
)

// FollowServers calls tell with the URLs of the cluster's servers whenever they change: the endpoints of the
// service "kubernetes". It must be called before Run.
func (w *Watches) FollowServers(tell func(urls []string)) error {
	informer := w.informers.Discovery().V1().EndpointSlices().Informer()
	update := func(obj any) {
		if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = gone.Obj
		}
		if s, ok := obj.(*discoveryv1.EndpointSlice); !ok || !namesServers(s) {
			return
		}
		var urls []string
		for _, obj := range informer.GetStore().List() {
			if s, ok := obj.(*discoveryv1.EndpointSlice); ok && namesServers(s) {
				urls = append(urls, serversOf(s)...)
			}
		}
		slices.Sort(urls)
		tell(slices.Compact(urls))
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: update, UpdateFunc: func(_, obj any) { update(obj) }, DeleteFunc: update})
	if err != nil {
		return fmt.Errorf("follow the servers: %w", err)
	}
	return nil
}

func namesServers(s *discoveryv1.EndpointSlice) bool {
	return s.Namespace == metav1.NamespaceDefault && s.Labels[discoveryv1.LabelServiceName] == "kubernetes"
}

func serversOf(s *discoveryv1.EndpointSlice) (urls []string) {
	for _, p := range s.Ports {
		if p.Port == nil || p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP {
			continue
		}
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			for _, a := range e.Addresses {
				urls = append(urls, "https://"+net.JoinHostPort(a, strconv.Itoa(int(*p.Port))))
			}
		}
	}
	return urls
}
