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

	"kedge/internal/lifecycle"

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

// listName is the name of the ConfigMap in kube-system.
const listName = "kedge-servers"

// retry is the delay after a failed write.
const retry = time.Second

// Entry is a server's entry in the list.
type Entry struct {
	API netip.AddrPort `json:"api"` // address of its API for other machines
	// Node is the UID of the server's node, once it has registered one. After that the server belongs to the
	// cluster only as long as the node exists.
	Node types.UID `json:"node,omitempty"`
}

// Directory is the component that maintains this server's entry and reads those of the others. Its methods may
// be called at any time.
type Directory struct {
	name   string // name of this server
	client kubernetes.Interface
	log    *slog.Logger
	wake   lifecycle.Wakeup // requests a comparison of the own entry

	mu      sync.Mutex // guards the fields below
	own     Entry
	servers map[string]Entry // the content of the list
	changed chan struct{}    // closed when servers changes
}

// New returns the directory of the named server. client acts for the server itself.
func New(name string, api netip.AddrPort, client kubernetes.Interface, log *slog.Logger) *Directory {
	return &Directory{
		name: name, client: client, log: log, wake: lifecycle.NewWakeup(),
		own: Entry{API: api}, servers: map[string]Entry{}, changed: make(chan struct{}),
	}
}

// Name implements lifecycle.Component.
func (d *Directory) Name() string { return "directory" }

// SetAPI changes the address of this server's API.
func (d *Directory) SetAPI(api netip.AddrPort) { d.set(func(e *Entry) { e.API = api }) }

// SetNode sets the UID of this server's node.
func (d *Directory) SetNode(uid types.UID) { d.set(func(e *Entry) { e.Node = uid }) }

func (d *Directory) set(change func(*Entry)) {
	d.mu.Lock()
	change(&d.own)
	d.mu.Unlock()
	d.wake.Wake()
}

// Servers returns the known servers by name, including this one, and a channel that is closed when they have
// changed.
func (d *Directory) Servers() (map[string]Entry, <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := maps.Clone(d.servers)
	all[d.name] = d.own
	return all, d.changed
}

// URLs returns the URLs of the servers' APIs, this server's first.
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

// Run implements lifecycle.Component. It calls ready when the list was read once.
func (d *Directory) Run(ctx context.Context, ready func()) error {
	factory := informers.NewSharedInformerFactoryWithOptions(d.client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, listName).String()
		}))
	defer factory.Shutdown()
	lists := factory.Core().V1().ConfigMaps().Informer()
	registered, err := lists.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    d.setList,
		UpdateFunc: func(_, o any) { d.setList(o) },
		DeleteFunc: func(any) { d.setList(&corev1.ConfigMap{}) },
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
			d.log.Warn("this server's entry in the list of servers could not be written; trying again", "err", err, "again", retry)
			time.AfterFunc(retry, d.wake.Wake)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-d.wake:
		}
	}
}

// setList stores a new content of the list.
func (d *Directory) setList(o any) {
	list, ok := o.(*corev1.ConfigMap)
	if !ok || list.Name != listName && list.Name != "" {
		return
	}
	servers := map[string]Entry{}
	for name, text := range list.Data {
		var e Entry
		if err := json.Unmarshal([]byte(text), &e); err != nil || !e.API.IsValid() {
			d.log.Warn("an entry in the list of servers is invalid; its server writes it again at its next start", "server", name, "err", err)
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
	d.wake.Wake()
}

// write updates the own entry in the list if it differs.
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

// Forget removes a server from the list.
func (d *Directory) Forget(ctx context.Context, name string) error {
	return patch(ctx, d.client.CoreV1().ConfigMaps(metav1.NamespaceSystem), map[string]any{name: nil})
}

// Gone returns when a server is not in the list any more, or when ctx ends.
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

// patch changes single entries, so that concurrent writes of servers do not conflict.
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
