package hook

import (
	"context"
	"go/ast"
	"log/slog"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/feature"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"

	"kedge/datastore"
	"kedge/internal/test/upstream"
)

const advice = `

The hook sets the unexported variable newETCD3Client of k8s.io/apiserver/pkg/storage/storagebackend/factory through
go:linkname (see hook.go). This version of Kubernetes has changed or removed it. Find out how that package makes etcd
clients now. If it still uses one package variable, adapt the declaration in hook.go and this test. If not, either patch an
exported setter into the package with a replace in go.mod, or give TransportConfig.EgressLookup an in-memory dialer to a
gRPC server on the store.`

// TestMatchesUpstream compares names and types with the source, because the linker compares neither.
func TestMatchesUpstream(t *testing.T) {
	library := upstream.Parse(t, "k8s.io/apiserver/pkg/storage/storagebackend/factory")
	variable := library.Variables()["newETCD3Client"]
	declared, ok := variable.Value.(*ast.FuncLit)
	if !ok || variable.Type != nil {
		t.Fatalf("there is no variable newETCD3Client that holds a function.%s", advice)
	}
	const want = "func(c storagebackend.TransportConfig) (*kubernetes.Client, error)"
	if got := library.Text(t, declared.Type); got != want {
		t.Errorf("newETCD3Client is a %s, want a %s.%s", got, want, advice)
	}
	uses := 0
	for _, file := range library.Files {
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			switch f := call.Fun.(type) {
			case *ast.Ident:
				if f.Name == "newETCD3Client" {
					uses++
				}
			case *ast.SelectorExpr:
				// A second place that makes clients would bypass the variable.
				x, ok := f.X.(*ast.Ident)
				outside := call.Pos() < declared.Pos() || call.Pos() > declared.End()
				if ok && outside && f.Sel.Name == "New" && (x.Name == "clientv3" || x.Name == "kubernetes") {
					t.Errorf("%s makes a client that the hook does not see.%s", library.Set.Position(call.Pos()), advice)
				}
			}
			return true
		})
	}
	// One each for storages, probes and the compactor.
	if uses < 3 {
		t.Errorf("newETCD3Client is called in %d places, it was 3.%s", uses, advice)
	}
	ours := reflect.TypeFor[func(storagebackend.TransportConfig) (*kubernetes.Client, error)]()
	if reflect.TypeOf(newETCD3Client) != ours {
		t.Errorf("the hook is a %T", newETCD3Client)
	}
}

// TestInstall writes through a storage of the library, and reads the object from the store.
func TestInstall(t *testing.T) {
	upstream := newETCD3Client
	if upstream == nil {
		t.Fatalf("the hook is not the library's variable: it has no value.%s", advice)
	}
	t.Cleanup(func() { newETCD3Client = upstream })

	store := startStore(t)
	Install(store)

	config := storagebackend.NewDefaultConfig("/registry", unstructured.UnstructuredJSONScheme)
	config.Transport.ServerList = []string{datastore.Endpoint}
	newObject := func() runtime.Object { return &unstructured.Unstructured{} }
	newList := func() runtime.Object { return &unstructured.UnstructuredList{} }
	resource := config.ForResource(schema.GroupResource{Group: "kedge.test", Resource: "things"})
	made, destroy, err := factory.Create(*resource, newObject, newList, "/things")
	if err != nil {
		t.Fatal(err)
	}
	defer destroy()

	thing := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "kedge.test/v1", "kind": "Thing", "metadata": map[string]any{"name": "a"},
	}}
	if err := made.Create(t.Context(), "/things/a", thing, &unstructured.Unstructured{}, 0); err != nil {
		t.Fatal(err)
	}

	client, err := store.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	got, err := client.Kubernetes.Get(t.Context(), "/registry/things/a", kubernetes.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got.KV == nil || !strings.Contains(string(got.KV.Value), `"Thing"`) {
		t.Errorf("the store has %v: factory.Create did not use it.%s", got.KV, advice)
	}

	t.Run("health", func(t *testing.T) {
		stop := make(chan struct{})
		defer close(stop)
		check, err := factory.CreateHealthCheck(*config, stop)
		if err != nil {
			t.Fatal(err)
		}
		if err := eventually(t, check); err != nil {
			t.Error(err)
		}
	})

	t.Run("size", func(t *testing.T) {
		monitor, err := factory.CreateMonitor(*config)
		if err != nil {
			t.Fatal(err)
		}
		defer monitor.Close()
		if size, err := monitor.Monitor(t.Context()); err != nil || size.Size == 0 {
			t.Errorf("size %v, %v", size, err)
		}
	})

	// Without watch progress, every consistent list goes to the store instead of the API server's cache.
	t.Run("watch progress", func(t *testing.T) {
		err := eventually(t, func() error {
			if !feature.DefaultFeatureSupportChecker.Supports(storage.RequestWatchProgress) {
				return storage.NewInternalError(context.DeadlineExceeded)
			}
			return nil
		})
		if err != nil {
			t.Error("the API server believes that the store cannot report watch progress")
		}
	})
}

// A configuration that names another etcd server must reach it.
func TestInstallLeavesOtherServersAlone(t *testing.T) {
	upstream := newETCD3Client
	t.Cleanup(func() { newETCD3Client = upstream })
	var dialled []string
	newETCD3Client = func(c storagebackend.TransportConfig) (*kubernetes.Client, error) {
		dialled = c.ServerList
		return nil, nil
	}
	Install(datastore.New(datastore.DefaultConfig(), slog.New(slog.DiscardHandler)))

	if _, err := newETCD3Client(storagebackend.TransportConfig{ServerList: []string{"https://etcd.test:2379"}}); err != nil {
		t.Error(err)
	}
	if len(dialled) != 1 {
		t.Error("the client for another server did not come from the library")
	}
	if _, err := newETCD3Client(storagebackend.TransportConfig{ServerList: []string{datastore.Endpoint}}); err == nil {
		t.Error("got a client of a store that does not run")
	}
}

func startStore(t *testing.T) *datastore.Store {
	t.Helper()
	config := datastore.DefaultConfig()
	config.Dir = t.TempDir()
	store := datastore.New(config, slog.New(slog.NewTextHandler(t.Output(), nil)))
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- store.Run(ctx, func() { close(ready) }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		t.Fatal(err)
	}
	return store
}

// eventually retries f, for results of goroutines of the library that do not report their end.
func eventually(t *testing.T, f func() error) (err error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		if err = f(); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}
