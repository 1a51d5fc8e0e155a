package importk3s

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
)

const (
	fieldManager = "kedge-import"
	// establishTimeout bounds the wait for the API of a CustomResourceDefinition.
	establishTimeout = 30 * time.Second
	establishPause   = 200 * time.Millisecond
	// retries is how often objects are tried again that could not be created, for example because a controller has not yet
	// created the service account of a pod.
	retries    = 3
	retryPause = 2 * time.Second
	// requestsPerSecond of the import. The API server's own fairness protects other clients.
	requestsPerSecond = 200
)

// Options change what an import does.
type Options struct {
	DryRun    bool // create nothing, and report what would be done
	Overwrite bool // change objects that exist and differ
}

// Importer creates the objects of a snapshot in a cluster.
type Importer struct {
	opts   Options
	api    dynamic.Interface
	mapper meta.ResettableRESTMapper

	retryPause time.Duration

	choice *choice
	ranges []netip.Prefix            // of the cluster's services
	done   map[*object]*result       // what has become of each object
	last   bool                      // this is the last attempt
	known  map[schema.GroupKind]bool // kinds that the snapshot's definitions define
}

// result is what has become of an object.
type result struct {
	entry Entry
	uid   types.UID // in the new cluster; empty if it does not exist there
	err   error
}

// errOwner is the failure of an object that is tried again with its owner.
var errOwner = errors.New("its owner could not be imported")

// NewImporter returns the importer for a cluster. client may do everything there.
func NewImporter(client *rest.Config, opts Options) (*Importer, error) {
	client = rest.CopyConfig(client)
	client.QPS, client.Burst = requestsPerSecond, requestsPerSecond
	client.WarningHandler = rest.NoWarnings{} // about kinds that the user had before, such as Endpoints
	api, err := dynamic.NewForConfig(client)
	if err != nil {
		return nil, err
	}
	d, err := discovery.NewDiscoveryClientForConfig(client)
	if err != nil {
		return nil, err
	}
	return newImporter(api, restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(d)), opts), nil
}

func newImporter(api dynamic.Interface, mapper meta.ResettableRESTMapper, opts Options) *Importer {
	return &Importer{opts: opts, api: api, mapper: mapper, retryPause: retryPause, done: map[*object]*result{}, known: map[schema.GroupKind]bool{}}
}

// Run imports the objects of a snapshot. An object that cannot be imported is in the report; an error is returned if the import
// was stopped. It can be run again: what exists is not created twice.
func (i *Importer) Run(ctx context.Context, s *Snapshot) (Report, error) {
	i.choice = choose(s.objects)
	var err error
	if i.ranges, err = i.serviceRanges(ctx); err != nil {
		return Report{}, fmt.Errorf("the new cluster does not say which addresses its services have: %w", err)
	}
	var queue []*object
	for _, o := range s.objects {
		if i.choice.left[o] == "" {
			queue = append(queue, o)
			if defined, ok := definedBy(o.Unstructured); ok {
				i.known[defined] = true
			}
		}
	}
	ranks := i.choice.ranks(queue)
	slices.SortStableFunc(queue, func(a, b *object) int { return ranks[a] - ranks[b] })
	err = i.importAll(ctx, queue)
	for n := 1; n <= retries && err == nil && i.resetFailed(); n++ {
		i.last = n == retries
		if err = pause(ctx, i.retryPause); err == nil {
			err = i.importAll(ctx, queue)
		}
	}
	r := Report{Notices: i.choice.notices()}
	for _, o := range queue {
		if d := i.done[o]; d != nil {
			r.Entries = append(r.Entries, d.entry)
		}
	}
	r.Entries = append(append(r.Entries, s.unread...), i.choice.leftOut()...)
	return r, err
}

// importAll imports the objects of a queue that are not done yet.
func (i *Importer) importAll(ctx context.Context, queue []*object) error {
	for n, o := range queue {
		if n > 0 && rankOf(queue[n-1]) == rankDefinition && rankOf(o) != rankDefinition {
			i.awaitDefinitions(ctx, queue[:n])
		}
		i.visit(ctx, o, nil)
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// resetFailed forgets the failures that may pass, and reports whether there were any.
func (i *Importer) resetFailed() (any bool) {
	if i.opts.DryRun {
		return false
	}
	for o, d := range i.done {
		if d.err != nil && !apierrors.IsInvalid(d.err) {
			delete(i.done, o)
			any = true
		}
	}
	if any {
		i.mapper.Reset()
	}
	return any
}

// visit imports an object, and its owners before, whose UIDs it needs. path has the objects that wait for it. Without an owner that
// fails it is created at the last attempt only.
func (i *Importer) visit(ctx context.Context, o *object, path []*object) {
	if i.done[o] != nil || slices.Contains(path, o) || ctx.Err() != nil {
		return
	}
	u := clean(o.Unstructured)
	var owners []metav1.OwnerReference
	for _, ref := range o.GetOwnerReferences() {
		owner := i.choice.owner(o, ref)
		if owner == nil {
			continue
		}
		i.visit(ctx, owner, append(path, o))
		switch d := i.done[owner]; {
		case d != nil && d.uid != "":
			ref.UID = d.uid
			owners = append(owners, ref)
		case d != nil && d.err != nil && !i.last:
			i.done[o] = &result{entry: entryOf(u, Failed, errOwner.Error()), err: errOwner}
			return
		}
	}
	u.SetOwnerReferences(owners)
	d := &result{}
	outcome, there, reason, err := i.put(ctx, u)
	if err != nil {
		outcome, reason, d.err = Failed, err.Error(), err
	}
	d.entry = entryOf(u, outcome, reason)
	if there != nil {
		d.uid = there.GetUID()
	}
	i.done[o] = d
}

// put creates an object, or compares it with the one that exists. there is the object in the cluster; nil if there is none.
func (i *Importer) put(ctx context.Context, u *unstructured.Unstructured) (outcome Outcome, there *unstructured.Unstructured, reason string, err error) {
	kind := u.GroupVersionKind()
	mapping, err := i.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if meta.IsNoMatchError(err) {
		if i.opts.DryRun && i.known[kind.GroupKind()] {
			return Created, nil, "", nil
		}
		if i.known[kind.GroupKind()] {
			return "", nil, "", fmt.Errorf("the cluster does not serve the kind %s in version %s, which its CustomResourceDefinition should define", kind.GroupKind(), kind.Version)
		}
		return "", nil, "", fmt.Errorf("the cluster does not serve the kind %s in version %s; in k3s, read and replace the object once with kubectl, so that it is stored in a later version", kind.GroupKind(), kind.Version)
	}
	if err != nil {
		return "", nil, "", err
	}
	var at dynamic.ResourceInterface = i.api.Resource(mapping.Resource)
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		at = i.api.Resource(mapping.Resource).Namespace(u.GetNamespace())
	}
	if isService(u) {
		reason = i.keepAddress(u)
	}
	// It is asked for first: of an object that exists, the creation can fail for other reasons, such as its own node port.
	there, err = at.Get(ctx, u.GetName(), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		if i.opts.DryRun {
			return Created, nil, reason, nil
		}
		there, err = at.Create(ctx, u, metav1.CreateOptions{FieldManager: fieldManager})
		if err != nil && isService(u) && refusesAddress(err) {
			dropAddress(u)
			reason = "with another address: the old one is taken"
			there, err = at.Create(ctx, u, metav1.CreateOptions{FieldManager: fieldManager})
		}
		if err == nil {
			return Created, there, reason, nil
		}
		if !apierrors.IsAlreadyExists(err) {
			return "", nil, "", err
		}
		there, err = at.Get(ctx, u.GetName(), metav1.GetOptions{}) // a controller was faster
	}
	if err != nil {
		return "", nil, "", err
	}
	outcome, reason, err = i.reconcile(ctx, at, u, there)
	return outcome, there, reason, err
}

// reconcile compares an object with the one that exists, and changes that if it may.
func (i *Importer) reconcile(ctx context.Context, at dynamic.ResourceInterface, u, there *unstructured.Unstructured) (Outcome, string, error) {
	field := difference(u.Object, there.Object)
	if field == "" && lacksOwner(u, there) {
		field = "metadata.ownerReferences"
	}
	if field == "" {
		return Unchanged, "", nil
	}
	outcome := Updated
	switch {
	case isMadeByCluster(u) && difference(there.Object, u.Object) == "":
		outcome = Completed
	case !i.opts.Overwrite:
		return Differs, field, nil
	}
	if i.opts.DryRun {
		return outcome, field, nil
	}
	next := there.DeepCopy()
	for k, v := range compared(u.Object) {
		if k != "metadata" {
			next.Object[k] = merged(v, there.Object[k])
		}
	}
	next.SetLabels(union(there.GetLabels(), u.GetLabels()))
	next.SetAnnotations(union(there.GetAnnotations(), u.GetAnnotations()))
	if lacksOwner(u, there) {
		next.SetOwnerReferences(u.GetOwnerReferences())
	}
	_, err := at.Update(ctx, next, metav1.UpdateOptions{FieldManager: fieldManager})
	return outcome, field, err
}

// lacksOwner reports whether an existing object does not refer to an owner to which the imported one does.
func lacksOwner(u, there *unstructured.Unstructured) bool {
	return slices.ContainsFunc(u.GetOwnerReferences(), func(want metav1.OwnerReference) bool {
		return !slices.ContainsFunc(there.GetOwnerReferences(), func(have metav1.OwnerReference) bool { return have.UID == want.UID })
	})
}

// isMadeByCluster reports whether every cluster creates an object of this kind and name by itself, almost empty.
func isMadeByCluster(u *unstructured.Unstructured) bool {
	return u.GetKind() == "Namespace" || u.GetKind() == "ServiceAccount" && u.GetName() == "default"
}

// awaitDefinitions waits until the API serves the kinds of the definitions that were created. Those that it does not serve in time
// are noticed when an object of them is created.
func (i *Importer) awaitDefinitions(ctx context.Context, queue []*object) {
	if i.opts.DryRun {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, establishTimeout)
	defer cancel()
	definitions := i.api.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	for _, o := range queue {
		if d := i.done[o]; rankOf(o) != rankDefinition || d == nil || d.err != nil {
			continue
		}
		for {
			there, err := definitions.Get(ctx, o.GetName(), metav1.GetOptions{})
			if err == nil && isEstablished(there) || pause(ctx, establishPause) != nil {
				break
			}
		}
	}
	i.mapper.Reset()
}

func isEstablished(u *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	return slices.ContainsFunc(conditions, func(c any) bool {
		m, _ := c.(map[string]any)
		return m["type"] == "Established" && m["status"] == "True"
	})
}

// serviceRanges returns the ranges of the cluster's service addresses; none if it does not say.
func (i *Importer) serviceRanges(ctx context.Context) (ranges []netip.Prefix, err error) {
	all, err := i.api.Resource(schema.GroupVersionResource{Group: "networking.k8s.io", Version: "v1", Resource: "servicecidrs"}).List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, one := range all.Items {
		texts, _, _ := unstructured.NestedStringSlice(one.Object, "spec", "cidrs")
		for _, text := range texts {
			if r, err := netip.ParsePrefix(text); err == nil {
				ranges = append(ranges, r)
			}
		}
	}
	return ranges, nil
}

func isService(u *unstructured.Unstructured) bool {
	return u.GetKind() == "Service" && u.GroupVersionKind().Group == ""
}

// keepAddress lets a service have its old address if it is in the cluster's range, and returns what was changed otherwise.
func (i *Importer) keepAddress(u *unstructured.Unstructured) string {
	all, _, _ := unstructured.NestedStringSlice(u.Object, "spec", "clusterIPs")
	if one, _, _ := unstructured.NestedString(u.Object, "spec", "clusterIP"); len(all) == 0 && one != "" {
		all = []string{one}
	}
	for _, text := range all {
		a, err := netip.ParseAddr(text) // "None" is no address
		if err == nil && len(i.ranges) > 0 && !slices.ContainsFunc(i.ranges, func(r netip.Prefix) bool { return r.Contains(a) }) {
			dropAddress(u)
			return fmt.Sprintf("with another address: %s is not in the cluster's range", text)
		}
	}
	return ""
}

// dropAddress removes the addresses of a service, and their families, which the cluster may not have.
func dropAddress(u *unstructured.Unstructured) {
	for _, field := range []string{"clusterIP", "clusterIPs", "ipFamilies"} {
		unstructured.RemoveNestedField(u.Object, "spec", field)
	}
}

// refusesAddress reports whether an error is about the address of a service.
func refusesAddress(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) || status.Status().Details == nil {
		return false
	}
	return slices.ContainsFunc(status.Status().Details.Causes, func(c metav1.StatusCause) bool {
		return hasAnyPrefix(c.Field, []string{"spec.clusterIP", "spec.ipFamil"})
	})
}

// union returns the entries of both maps; those of the second count.
func union(a, b map[string]string) map[string]string {
	out := map[string]string{}
	for _, m := range []map[string]string{a, b} {
		for k, v := range m {
			out[k] = v
		}
	}
	return out
}

// pause waits, and returns an error if ctx ends before.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
