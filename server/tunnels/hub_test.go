package tunnels

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/yamux"

	"kedge/internal/joining"
	"kedge/internal/test/await"
	"kedge/internal/tunnel"
)

// world is a hub on a server, and nodes that connect to it. A node is who its server
// name in TLS says, which stands for a certificate here.
type world struct {
	*Hub
	t   *testing.T
	srv *httptest.Server

	mu      sync.Mutex
	keys    map[string]string
	newKeys chan struct{} // closed when keys has changed

	owners     map[string]string // of addresses
	identified func()            // called between the answer of Identify and the session; may be nil
}

func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	w := newIdleWorld(t, change)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return w
}

// newIdleWorld is one whose hub does not run: it ends no session when keys change.
func newIdleWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	w := &world{t: t, keys: map[string]string{"a": "key-a", "b": "key-b"}, newKeys: make(chan struct{}), owners: map[string]string{}}
	c := Config{
		Authenticator: w, Keys: w, PodRanges: []netip.Prefix{netip.MustParsePrefix("127.0.1.0/24")}, ServiceRanges: []netip.Prefix{netip.MustParsePrefix("127.0.2.0/24")},
	}
	if change != nil {
		change(&c)
	}
	w.Hub = New(c, slog.New(slog.DiscardHandler))
	w.SetNodes(w)
	w.srv = httptest.NewUnstartedServer(w.Hub)
	w.srv.StartTLS()
	t.Cleanup(w.srv.Close)
	return w
}

var errStranger = errors.New("nobody knows this key")

// Identify implements Authenticator: the server name is NODE.KEY.
func (w *world) Identify(r *http.Request) (node, key string, err error) {
	node, key, _ = strings.Cut(r.TLS.ServerName, ".")
	w.mu.Lock()
	known := w.keys[node] == key
	w.mu.Unlock()
	if !known {
		return "", "", errStranger
	}
	if w.identified != nil {
		w.identified()
	}
	return node, key, nil
}

// Refuse implements Authenticator.
func (w *world) Refuse(rw http.ResponseWriter, _ *http.Request, err error) {
	http.Error(rw, err.Error(), http.StatusForbidden)
}

// Keys implements Keys.
func (w *world) Keys() (map[string]string, <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return maps.Clone(w.keys), w.newKeys
}

// setKey gives a name to a key, or takes it from all.
func (w *world) setKey(node, key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keys[node] = key
	close(w.newKeys)
	w.newKeys = make(chan struct{})
}

// Owner implements Nodes.
func (w *world) Owner(a netip.Addr) string { return w.owners[a.String()] }

// Names implements Nodes.
func (w *world) Names() []string { return []string{"a", "b", "server"} }

// connect is a node that answers every stream with who it is and what was asked for.
// The channel is closed when its session has ended.
func (w *world) connect(node, key string) (ended <-chan struct{}, err error) {
	w.t.Helper()
	ended, _, err = w.connectAs(node, key, node)
	return ended, err
}

// connectAs is connect of a node that says something else, and can be ended.
func (w *world) connectAs(node, key, text string) (ended <-chan struct{}, end func(), err error) {
	w.t.Helper()
	conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, ServerName: node + "." + key}}).Dial("tcp", w.srv.Listener.Addr().String())
	if err != nil {
		w.t.Fatal(err)
	}
	up, err := tunnel.Upgrade(w.t.Context(), conn, "server")
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = tunnel.Serve(ctx, up, says(text), tunnel.DefaultOptions(), slog.New(slog.DiscardHandler))
	}()
	return done, cancel, nil
}

func (w *world) mustConnect(node, key string) <-chan struct{} {
	w.t.Helper()
	ended, err := w.connect(node, key)
	if err != nil {
		w.t.Fatal(err)
	}
	await.True(w.t, node+" is connected", func() bool { return slices.Contains(w.Connected(), node) })
	return ended
}

func says(node string) tunnel.DialFunc {
	return func(_ context.Context, d tunnel.Destination) (net.Conn, error) {
		here, there := net.Pipe()
		go func() {
			fmt.Fprintf(there, "%s: %s", node, d)
			there.Close()
		}()
		return here, nil
	}
}

func read(t *testing.T, c net.Conn, err error) string {
	t.Helper()
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	got, err := io.ReadAll(c)
	if err != nil {
		return err.Error()
	}
	return string(got)
}

// kubelet is what is read from the kubelet of a node.
func (w *world) kubelet(node string) string {
	w.t.Helper()
	c, err := w.Kubelet(w.t.Context(), "tcp", netip.AddrPortFrom(joining.NodeAddress(node), 10250).String())
	return read(w.t, c, err)
}

func (w *world) cluster(address string) string {
	w.t.Helper()
	c, err := w.Cluster(w.t.Context(), "tcp", address)
	return read(w.t, c, err)
}

// A node of an earlier version does not know the destination, and closes the stream.
func TestNodeIsTooOld(t *testing.T) {
	w := newWorld(t, nil)
	conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, ServerName: "a.key-a"}}).Dial("tcp", w.srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if conn, err = tunnel.Upgrade(t.Context(), conn, "server"); err != nil {
		t.Fatal(err)
	}
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	mux, err := yamux.Server(conn, config)
	if err != nil {
		t.Fatal(err)
	}
	defer mux.Close()
	go func() {
		for {
			stream, err := mux.AcceptStream()
			if err != nil {
				return
			}
			_, _ = io.ReadFull(stream, make([]byte, 3))
			stream.Close()
		}
	}()
	await.True(t, "a is connected", func() bool { return slices.Contains(w.Connected(), "a") })
	if _, err := w.Node(t.Context(), "a"); !errors.Is(err, errors.ErrUnsupported) || !strings.Contains(err.Error(), "kedge on node a is too old") {
		t.Errorf("%v", err)
	}
	w.mustConnect("b", "key-b")
	c, err := w.Node(t.Context(), "b")
	if got := read(t, c, err); got != "b: kedge" {
		t.Errorf("a node of today says %q", got)
	}
}

func TestKubeletIsTheNodeOfTheSession(t *testing.T) {
	w := newWorld(t, nil)
	w.mustConnect("a", "key-a")
	w.mustConnect("b", "key-b")
	for _, node := range []string{"a", "b"} {
		if got, want := w.kubelet(node), node+": the kubelet"; got != want {
			t.Errorf("the kubelet of %s says %q, want %q", node, got, want)
		}
	}
	for _, address := range []string{"10.0.0.1:10250", "a:10250", "127.0.0.1:10250", ""} {
		if c, err := w.Kubelet(t.Context(), "tcp", address); err == nil {
			c.Close()
			t.Errorf("%q leads to a kubelet", address)
		}
	}
}

// A name with another key is no name.
func TestStrangersGetNoSession(t *testing.T) {
	w := newWorld(t, nil)
	w.mustConnect("a", "key-a")
	for _, who := range [][2]string{{"a", "key-b"}, {"b", "key-a"}, {"c", ""}, {"a", ""}} {
		if _, err := w.connect(who[0], who[1]); who[0] != "c" && !errors.Is(err, tunnel.ErrNoUpgrade) {
			t.Errorf("%v: %v", who, err)
		}
	}
	if got := w.kubelet("a"); got != "a: the kubelet" {
		t.Errorf("the node's own session says %q", got)
	}
}

// The newest session is used, older ones when it has ended, and there are not too many.
func TestNewestSessionWins(t *testing.T) {
	w := newWorld(t, nil)
	first := w.mustConnect("a", "key-a")
	var ends []func()
	for i := range maxSessions {
		text := fmt.Sprint("session ", i)
		_, end, err := w.connectAs("a", "key-a", text)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
		// The server is about to take it.
		await.True(t, text+" is used", func() bool { return w.kubelet("a") == text+": the kubelet" })
	}
	<-first // one too many
	for i := maxSessions - 1; i > 0; i-- {
		ends[i]()
		before := fmt.Sprint("session ", i-1)
		await.True(t, before+" is used again", func() bool { return w.kubelet("a") == before+": the kubelet" })
	}
}

// Whoever loses the name loses the session, and the next one gets its own.
func TestSessionEndsWithItsKey(t *testing.T) {
	w := newWorld(t, nil)
	old, other := w.mustConnect("a", "key-a"), w.mustConnect("b", "key-b")
	w.setKey("a", "key-new")
	<-old
	if _, err := w.connect("a", "key-a"); !errors.Is(err, tunnel.ErrNoUpgrade) {
		t.Errorf("the old key is let in: %v", err)
	}
	w.mustConnect("a", "key-new")
	if got := w.kubelet("a"); got != "a: the kubelet" {
		t.Errorf("it says %q", got)
	}
	select {
	case <-other:
		t.Error("another node's session has ended")
	default:
	}
}

// TestKeyIsLostWhileItConnects: the name goes after the door was asked, and before there
// is a session that could be ended. Run, which may have looked in between, does not here.
func TestKeyIsLostWhileItConnects(t *testing.T) {
	w := newIdleWorld(t, nil)
	w.identified = func() { w.setKey("a", "key-new") }
	ended, err := w.connect("a", "key-a")
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("a key that has lost its name keeps its session")
	}
}

// A node that is just coming back is waited for, and one that does not is named.
func TestNodeIsWaitedFor(t *testing.T) {
	w := newWorld(t, nil)
	got := make(chan string)
	go func() { got <- w.kubelet("a") }()
	w.mustConnect("a", "key-a")
	if got := <-got; got != "a: the kubelet" {
		t.Errorf("it says %q", got)
	}
	_, err := w.Kubelet(t.Context(), "tcp", netip.AddrPortFrom(joining.NodeAddress("b"), 10250).String())
	if !errors.Is(err, ErrNotConnected) || !strings.Contains(err.Error(), ": b;") {
		t.Errorf("got %v", err)
	}
}

// listen is a service of this machine itself.
func listen(t *testing.T, address, text string) string {
	t.Helper()
	l, err := net.Listen("tcp", address+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, text)
			c.Close()
		}
	}()
	return l.Addr().String()
}

func TestClusterOfAServerWithANode(t *testing.T) {
	kubelet := netip.MustParseAddrPort(listen(t, "127.0.0.1", "own kubelet"))
	w := newWorld(t, func(c *Config) { c.OwnNode, c.OwnKubelet = "server", kubelet })
	outside, ownPod, service := listen(t, "127.0.0.1", "outside"), listen(t, "127.0.1.1", "own pod"), listen(t, "127.0.2.1", "service")
	unknown := listen(t, "127.0.1.9", "pod by the data path")
	w.owners["127.0.1.1"], w.owners["127.0.1.2"] = "server", "a"
	w.mustConnect("a", "key-a")
	for address, want := range map[string]string{
		outside: "outside", ownPod: "own pod", service: "service", unknown: "pod by the data path",
		"127.0.1.2:80": "a: 127.0.1.2:80", "[::ffff:127.0.1.2]:80": "a: 127.0.1.2:80",
	} {
		if got := w.cluster(address); got != want {
			t.Errorf("%s says %q, want %q", address, got, want)
		}
	}
	if got := w.kubelet("server"); got != "own kubelet" {
		t.Errorf("the own kubelet says %q", got)
	}
	if _, err := w.Cluster(t.Context(), "tcp", netip.AddrPortFrom(joining.NodeAddress("a"), 22).String()); !errors.Is(err, ErrOnlyKubelet) {
		t.Errorf("another port of a node: %v", err)
	}
}

func TestClusterOfAServerWithoutANode(t *testing.T) {
	w := newWorld(t, nil)
	w.owners["127.0.1.2"] = "b"
	if _, err := w.Cluster(t.Context(), "tcp", "127.0.1.2:80"); !errors.Is(err, ErrNotConnected) {
		t.Errorf("with no node at all: %v", err)
	}
	w.mustConnect("a", "key-a")
	// The node of the pod is not there, and another has a way to it.
	if got := w.cluster("127.0.1.2:80"); got != "a: 127.0.1.2:80" {
		t.Errorf("the pod says %q", got)
	}
	w.mustConnect("b", "key-b")
	if got := w.cluster("127.0.1.2:80"); got != "b: 127.0.1.2:80" {
		t.Errorf("the pod says %q", got)
	}
	if got := w.cluster("127.0.2.1:443"); got != "a: 127.0.2.1:443" && got != "b: 127.0.2.1:443" {
		t.Errorf("a service says %q", got)
	}
}

func TestStoppedHubTakesNoSessions(t *testing.T) {
	w := newWorld(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ended := w.mustConnect("a", "key-a")
	if err := w.Hub.Run(ctx, func() {}); err != nil {
		t.Fatal(err)
	}
	<-ended
	w.mu.Lock()
	w.keys = nil // who asks for one is told of strangers
	w.mu.Unlock()
	if _, err := w.connect("b", "key-b"); !errors.Is(err, tunnel.ErrNoUpgrade) || !strings.Contains(err.Error(), errStopping.Error()) {
		t.Errorf("a node that comes late: %v", err)
	}
	if got := w.Connected(); slices.Contains(got, "b") {
		t.Errorf("connected are %v", got)
	}
}
