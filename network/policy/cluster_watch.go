package policy

import (
	"context"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"
)

var (
	definitions     = schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"}
	clusterPolicies = schema.GroupVersionResource{Group: v1alpha2.GroupName, Version: v1alpha2.GroupVersion.Version, Resource: "clusternetworkpolicies"}
)

// clusterWatch watches ClusterNetworkPolicies while the API has this kind. It is not built
// into Kubernetes: users may install its CustomResourceDefinition at any time.
type clusterWatch struct {
	policy *Policy
	client dynamic.Interface

	mu     sync.Mutex  // guards what follows
	found  func() bool // reports that the existence of the kind is known
	synced func() bool // reports that the policies have been read; nil while the kind does not exist
	stop   func()      // valid if synced is
}

// run watches until ctx ends.
func (w *clusterWatch) run(ctx context.Context) {
	only := fields.OneTermEqualSelector(metav1.ObjectNameField, clusterPolicies.GroupResource().String()).String()
	informer := dynamicinformer.NewFilteredDynamicInformer(w.client, definitions, "", 0, cache.Indexers{}, func(o *metav1.ListOptions) { o.FieldSelector = only }).Informer()
	// A definition is large, and only its existence matters.
	informer.SetTransform(func(obj any) (any, error) {
		u, ok := obj.(*unstructured.Unstructured)
		if !ok {
			return obj, nil
		}
		small := &unstructured.Unstructured{Object: map[string]any{servedKey: served(u)}}
		small.SetName(u.GetName())
		small.SetResourceVersion(u.GetResourceVersion())
		return small, nil
	})
	change := func(obj any) {
		u, ok := obj.(*unstructured.Unstructured)
		if !ok || u.GetName() != clusterPolicies.GroupResource().String() {
			return
		}
		yes, _, _ := unstructured.NestedBool(u.Object, servedKey)
		w.set(ctx, yes)
	}
	reg, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    change,
		UpdateFunc: func(_, obj any) { change(obj) },
		DeleteFunc: func(any) { w.set(ctx, false) },
	})
	if err != nil {
		return // only for a stopped informer
	}
	w.mu.Lock()
	w.found = reg.HasSynced
	w.mu.Unlock()
	informer.RunWithContext(ctx)
	w.set(ctx, false)
}

const servedKey = "served"

// served reports whether the API serves the version that this package reads.
func served(u *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	established := false
	for _, c := range conditions {
		m, _ := c.(map[string]any)
		established = established || m["type"] == "Established" && m["status"] == "True"
	}
	versions, _, _ := unstructured.NestedSlice(u.Object, "spec", "versions")
	for _, v := range versions {
		if m, _ := v.(map[string]any); m["name"] == clusterPolicies.Version && m["served"] == true {
			return established
		}
	}
	return false
}

// set starts and stops the watch of the policies.
func (w *clusterWatch) set(ctx context.Context, exists bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if exists == (w.synced != nil) {
		return
	}
	if !exists {
		w.stop()
		w.synced, w.stop = nil, nil
		if ctx.Err() == nil { // the kind was removed; the process is not ending
			w.policy.removeClusterPolicies()
		}
		return
	}
	informer := dynamicinformer.NewFilteredDynamicInformer(w.client, clusterPolicies, "", 0, cache.Indexers{}, nil).Informer()
	change := func(obj any, gone bool) {
		if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = last.Obj
		}
		if u, ok := obj.(*unstructured.Unstructured); ok {
			w.policy.setClusterPolicy(u, gone)
		}
	}
	reg, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { change(obj, false) },
		UpdateFunc: func(_, obj any) { change(obj, false) },
		DeleteFunc: func(obj any) { change(obj, true) },
	})
	if err != nil {
		return
	}
	inner, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { informer.RunWithContext(inner) })
	w.synced = reg.HasSynced
	w.stop = func() { cancel(); running.Wait() }
}

// hasSynced reports whether all policies have been read, or none can exist.
func (w *clusterWatch) hasSynced() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.found != nil && w.found() && (w.synced == nil || w.synced())
}

func (p *Policy) setClusterPolicy(u *unstructured.Unstructured, gone bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.notify()
	if gone {
		p.engine.setClusterPolicy(u.GetName(), nil)
		return
	}
	var cnp v1alpha2.ClusterNetworkPolicy
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &cnp); err != nil {
		p.log.Warn("cannot read ClusterNetworkPolicy; its previous version stays in force", "policy", u.GetName(), "err", err)
		return
	}
	read, err := newClusterPolicy(&cnp)
	if err != nil {
		p.log.Warn("cannot read part of a ClusterNetworkPolicy; that part matches nothing", "err", err)
	}
	p.engine.setClusterPolicy(read.name, read)
}

// removeClusterPolicies is called when the API no longer has the kind.
func (p *Policy) removeClusterPolicies() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for name := range p.engine.cluster {
		p.engine.setClusterPolicy(name, nil)
	}
	p.notify()
}
