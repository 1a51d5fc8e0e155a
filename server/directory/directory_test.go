package directory

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
)

var quiet = slog.New(slog.DiscardHandler)

func api(text string) netip.AddrPort { return netip.MustParseAddrPort(text) }

// run runs a component until the test ends or stop is called, and returns when it is
// ready.
func run(t *testing.T, c interface {
	Run(context.Context, func()) error
}) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- c.Run(ctx, sync.OnceFunc(func() { close(ready) })) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-ready:
	case <-time.After(10 * time.Second):
		t.Fatal("never ready")
	}
	return stop
}

// eventually waits until f returns nil.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

// listed are the entries in the API.
func listed(c kubernetes.Interface) (map[string]Entry, error) {
	list, err := c.CoreV1().ConfigMaps("kube-system").Get(context.Background(), listName, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	out := map[string]Entry{}
	for name, text := range list.Data {
		var e Entry
		if err := json.Unmarshal([]byte(text), &e); err != nil {
			return nil, err
		}
		out[name] = e
	}
	return out, nil
}

func wantListed(t *testing.T, c kubernetes.Interface, want map[string]Entry) {
	t.Helper()
	eventually(t, func() error {
		got, err := listed(c)
		if err == nil && !maps.Equal(got, want) {
			err = errors.New("the list has " + toJSON(got) + ", want " + toJSON(want))
		}
		return err
	})
}

func toJSON(v any) string {
	text, _ := json.Marshal(v)
	return string(text)
}

func TestEveryServerKeepsItsEntry(t *testing.T) {
	c := fake.NewClientset()
	a, b := New("a", api("192.0.2.1:6443"), c, quiet), New("b", api("192.0.2.2:6443"), c, quiet)
	run(t, a)
	run(t, b)
	wantListed(t, c, map[string]Entry{"a": {API: api("192.0.2.1:6443")}, "b": {API: api("192.0.2.2:6443")}})
	eventually(t, func() error {
		if got := a.URLs(); !slices.Equal(got, []string{"https://192.0.2.1:6443", "https://192.0.2.2:6443"}) {
			return errors.New("a knows " + toJSON(got))
		}
		if got := b.URLs(); !slices.Equal(got, []string{"https://192.0.2.2:6443", "https://192.0.2.1:6443"}) {
			return errors.New("b knows " + toJSON(got))
		}
		return nil
	})

	a.SetAPI(api("198.51.100.1:6443"))
	a.SetNode("uid-of-a")
	wantListed(t, c, map[string]Entry{"a": {API: api("198.51.100.1:6443"), Node: "uid-of-a"}, "b": {API: api("192.0.2.2:6443")}})

	// What somebody has taken away or spoilt comes back.
	if err := a.Forget(context.Background(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := patch(context.Background(), c.CoreV1().ConfigMaps("kube-system"), map[string]any{"b": "not an entry"}); err != nil {
		t.Fatal(err)
	}
	wantListed(t, c, map[string]Entry{"a": {API: api("198.51.100.1:6443"), Node: "uid-of-a"}, "b": {API: api("192.0.2.2:6443")}})
}

// world is what Endpoints sees of the other servers.
type world struct {
	dir *Directory

	mu        sync.Mutex // guards what follows
	dead      map[netip.AddrPort]bool
	members   map[string]bool // of the store
	forgotten []string
	unknown   error // why Names fails
	refuse    error // why Expel does
	fails     error // why Forget does
}

func (w *world) check(_ context.Context, a netip.AddrPort) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead[a] {
		return errors.New("no answer")
	}
	return nil
}

func (w *world) kill(a netip.AddrPort, dead bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dead[a] = dead
}

// Names implements Members.
func (w *world) Names(context.Context) ([]string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.members)), w.unknown
}

// Expel implements Members.
func (w *world) Expel(_ context.Context, name string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.refuse == nil {
		delete(w.members, name)
	}
	return w.refuse
}

// Forget implements Members.
func (w *world) Forget(ctx context.Context, name string) error {
	w.mu.Lock()
	w.forgotten = append(w.forgotten, name)
	err := w.fails
	w.mu.Unlock()
	if err != nil {
		return err
	}
	return w.dir.Forget(ctx, name)
}

// set changes the world.
func (w *world) set(change func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	change()
}

// published are the addresses that the service has.
func published(t *testing.T, c kubernetes.Interface, want ...string) {
	t.Helper()
	eventually(t, func() error {
		slice, err := c.DiscoveryV1().EndpointSlices("default").Get(context.Background(), serviceName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		var got []string
		for _, e := range slice.Endpoints {
			got = append(got, e.Addresses...)
		}
		legacy, err := c.CoreV1().Endpoints("default").Get(context.Background(), serviceName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !slices.Equal(got, want) || len(legacy.Subsets) != 1 || len(legacy.Subsets[0].Addresses) != len(want) {
			return errors.New("published are " + toJSON(got) + " and " + toJSON(legacy.Subsets))
		}
		return nil
	})
}

func newWorld(t *testing.T) (*fake.Clientset, *world, *Endpoints) {
	t.Helper()
	c := fake.NewClientset()
	ctx := context.Background()
	entries := map[string]any{}
	for name, e := range map[string]Entry{"b": {API: api("192.0.2.2:6443"), Node: "uid-b"}, "c": {API: api("192.0.2.3:6443"), Node: "uid-c"}} {
		if _, err := c.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		entries[name] = toJSON(e)
	}
	if err := patch(ctx, c.CoreV1().ConfigMaps("kube-system"), entries); err != nil {
		t.Fatal(err)
	}
	d := New("a", api("192.0.2.1:6443"), c, quiet)
	run(t, d)
	w := &world{dir: d, dead: map[netip.AddrPort]bool{}, members: map[string]bool{"a": true, "b": true, "c": true}}
	return c, w, &Endpoints{dir: d, members: w, client: c, log: quiet, check: w.check, failures: map[string]int{}, refused: map[string]bool{}}
}

func TestThoseThatAnswerArePublished(t *testing.T) {
	c, w, e := newWorld(t)
	run(t, e)
	published(t, c, "192.0.2.1", "192.0.2.2", "192.0.2.3")
	w.kill(api("192.0.2.2:6443"), true)
	published(t, c, "192.0.2.1", "192.0.2.3")
	w.kill(api("192.0.2.2:6443"), false)
	published(t, c, "192.0.2.1", "192.0.2.2", "192.0.2.3")
}

func TestServerThatNeverAnsweredIsNotPublished(t *testing.T) {
	c, w, e := newWorld(t)
	w.kill(api("192.0.2.3:6443"), true)
	run(t, e)
	published(t, c, "192.0.2.1", "192.0.2.2")
}

func TestNewLeaderTrustsWhatIsPublished(t *testing.T) {
	c, w, e := newWorld(t)
	if err := publish(context.Background(), c, []netip.AddrPort{api("192.0.2.1:6443"), api("192.0.2.2:6443")}); err != nil {
		t.Fatal(err)
	}
	w.kill(api("192.0.2.2:6443"), true)
	if err := e.trustPublished(context.Background()); err != nil {
		t.Fatal(err)
	}
	servers, _ := e.dir.Servers()
	e.checkAll(context.Background(), servers)
	if got := e.healthy(servers); len(got) != 3 {
		t.Errorf("after one answer that is missing: %v", got)
	}
	e.checkAll(context.Background(), servers)
	if got := e.healthy(servers); !slices.Equal(got, []netip.AddrPort{api("192.0.2.1:6443"), api("192.0.2.3:6443")}) {
		t.Errorf("after two: %v", got)
	}
}

func TestServerGoesWithItsNode(t *testing.T) {
	c, w, e := newWorld(t)
	w.refuse = errors.New("no majority would be left")
	run(t, e)
	if err := c.CoreV1().Nodes().Delete(context.Background(), "c", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if got, err := listed(c); err != nil || len(got) != 3 {
			return errors.New("a server was dropped that could not be removed")
		}
		return nil
	})
	w.set(func() { w.refuse = nil })
	published(t, c, "192.0.2.1", "192.0.2.2")
	w.set(func() {
		if !maps.Equal(w.members, map[string]bool{"a": true, "b": true}) || !slices.Contains(w.forgotten, "c") || slices.Contains(w.forgotten, "b") {
			t.Errorf("the members are %v, forgotten are %v", w.members, w.forgotten)
		}
	})
}

// However far a removal came: who is no member of the store is no server, and what it
// left is tidied up until nothing is left.
func TestWhoIsNoMemberIsForgotten(t *testing.T) {
	c, w, e := newWorld(t)
	delete(w.members, "c")
	w.unknown = errors.New("a member has not said its name")
	servers, _ := e.dir.Servers()
	e.followMembers(t.Context(), servers)
	if len(w.forgotten) > 0 {
		t.Fatalf("forgotten are %v, and one member may be it", w.forgotten)
	}
	w.unknown, w.fails = nil, errors.New("nothing can be written")
	stop := run(t, e)
	eventually(t, func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.forgotten) < 2 { // it is tried again
			return errors.New("forgotten are " + toJSON(w.forgotten))
		}
		return nil
	})
	short, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := e.dir.Gone(short, "c"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("c is gone: %v", err)
	}
	w.set(func() { w.fails = nil })
	if err := e.dir.Gone(t.Context(), "c"); err != nil {
		t.Error(err)
	}
	published(t, c, "192.0.2.1", "192.0.2.2")
	stop()
	// This server's own end is not its business.
	w.set(func() { delete(w.members, "a") })
	servers, _ = e.dir.Servers()
	e.followMembers(t.Context(), servers)
	w.set(func() {
		if slices.Contains(w.forgotten, "a") || slices.Contains(w.forgotten, "b") {
			t.Errorf("forgotten are %v", w.forgotten)
		}
	})
}
