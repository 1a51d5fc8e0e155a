package directory

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/cache"
)

// listName is the ConfigMap in kube-system.
const listName = "kedge-servers"

// retry is how long a write that failed is waited with.
const retry = time.Second

// Entry is what the list says of one server.
type Entry struct {
	API netip.AddrPort `json:"api"` // where other machines reach its API
	// Node is the UID of the server's node, once it has registered one. From then on
	// the server is a part of the cluster only as long as the node is.
	Node types.UID `json:"node,omitempty"`
}

// Directory is the component that keeps this server's entry and knows those of the
// others. Its methods may be called at any time.
type Directory struct {
	name   string // of this server
	client kubernetes.Interface
	log    *slog.Logger
	wake   chan struct{} // asks for a look at the own entry; holds one request

	mu      sync.Mutex // guards what follows
	own     Entry
	servers map[string]Entry // as the list has them
	changed chan struct{}    // closed when servers changes
}

// New makes the directory of the server of a name. client acts for the server itself.
func New(name string, api netip.AddrPort, client kubernetes.Interface, log *slog.Logger) *Directory {
	return &Directory{
		name: name, client: client, log: log, wake: make(chan struct{}, 1),
		own: Entry{API: api}, servers: map[string]Entry{}, changed: make(chan struct{}),
	}
}

// Name implements lifecycle.Component.
func (d *Directory) Name() string { return "directory" }

// SetAPI says that this server's API is reached elsewhere from now on.
func (d *Directory) SetAPI(api netip.AddrPort) { d.set(func(e *Entry) { e.API = api }) }

// SetNode says which node is this server's.
func (d *Directory) SetNode(uid types.UID) { d.set(func(e *Entry) { e.Node = uid }) }

func (d *Directory) set(change func(*Entry)) {
	d.mu.Lock()
	change(&d.own)
	d.mu.Unlock()
	d.poke()
}

func (d *Directory) poke() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// Servers returns what is known of each server, by name, this one always among them,
// and a channel that is closed when it has changed.
func (d *Directory) Servers() (map[string]Entry, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := maps.Clone(d.servers)
	all[d.name] = d.own
	return all, d.changed
}

// URLs are those of the servers' APIs, this one's first.
func (d *Directory) URLs() []string {
	all, _ := d.Servers()
	urls := []string{url(all[d.name])}
	delete(all, d.name)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		urls = append(urls, url(all[name]))
	}
	return urls
}

func url(e Entry) string { return "https://" + e.API.String() }

// Run implements lifecycle.Component. It is ready when the list was read once.
func (d *Directory) Run(ctx context.Context, ready func()) error {
	factory := informers.NewSharedInformerFactoryWithOptions(d.client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, listName).String()
		}))
	defer factory.Shutdown()
	lists := factory.Core().V1().ConfigMaps().Informer()
	registered, err := lists.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    d.read,
		UpdateFunc: func(_, o any) { d.read(o) },
		DeleteFunc: func(any) { d.read(&corev1.ConfigMap{}) },
	})
	if err != nil {
		return fmt.Errorf("follow the list of servers: %w", err)
	}
	factory.Start(ctx.Done())
	if !cache.WaitFor(ctx, "", registered.HasSyncedChecker()) {
		return nil // stopped before
	}
	ready()
	for {
		if err := d.write(ctx); err != nil && ctx.Err() == nil {
			d.log.Warn("this server's entry in the list of servers was not written", "err", err, "again", retry)
			time.AfterFunc(retry, d.poke)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-d.wake:
		}
	}
}

// read takes over a new state of the list.
func (d *Directory) read(o any) {
	list, ok := o.(*corev1.ConfigMap)
	if !ok || list.Name != listName && list.Name != "" {
		return
	}
	servers := map[string]Entry{}
	for name, text := range list.Data {
		var e Entry
		if err := json.Unmarshal([]byte(text), &e); err != nil || !e.API.IsValid() {
			d.log.Warn("an entry in the list of servers cannot be read; its server writes it again when it starts", "server", name, "err", err)
			continue
		}
		servers[name] = e
	}
	d.mu.Lock()
	if !maps.Equal(d.servers, servers) {
		d.servers = servers
		close(d.changed)
		d.changed = make(chan struct{})
	}
	d.mu.Unlock()
	d.poke()
}

// write makes the own entry in the list what it should be.
func (d *Directory) write(ctx context.Context) error {
	d.mu.Lock()
	want, have := d.own, d.servers[d.name]
	d.mu.Unlock()
	if want == have {
		return nil
	}
	text, err := json.Marshal(want)
	if err != nil {
		return err
	}
	return patch(ctx, d.client.CoreV1().ConfigMaps(metav1.NamespaceSystem), map[string]any{d.name: string(text)})
}

// Forget takes a server out of the list.
func (d *Directory) Forget(ctx context.Context, name string) error {
	return patch(ctx, d.client.CoreV1().ConfigMaps(metav1.NamespaceSystem), map[string]any{name: nil})
}

// Gone returns when another server is not in the list, or when ctx ends.
func (d *Directory) Gone(ctx context.Context, name string) error {
	for {
		servers, changed := d.Servers()
		if _, there := servers[name]; !there {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-changed:
		}
	}
}

// patch changes single entries, so that servers that write at once do not meet.
func patch(ctx context.Context, lists v1core.ConfigMapInterface, entries map[string]any) error {
	body, err := json.Marshal(map[string]any{"data": entries})
	if err != nil {
		return err
	}
	_, err = lists.Patch(ctx, listName, types.MergePatchType, body, metav1.PatchOptions{})
	if !apierrors.IsNotFound(err) {
		return err
	}
	if _, err := lists.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: listName}}, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	_, err = lists.Patch(ctx, listName, types.MergePatchType, body, metav1.PatchOptions{})
	return err
}
