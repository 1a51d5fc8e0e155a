package manifests

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"

	"kedge/internal/atomicfile"
)

const (
	// fieldManager is the owner of the fields in the objects' managedFields.
	fieldManager = "kedge-bundle"
	// annotation has the hash of the file by which an object was applied last. Several servers may have the same bundle, and
	// only the first of them applies it.
	annotation = "kedge.io/manifest"

	// maxManifest bounds the size of a file, in bytes.
	maxManifest = 16 << 20
	// maxRecord bounds the size of the record, in bytes.
	maxRecord = 4 << 20

	firstDelay = time.Second
	lastDelay  = 30 * time.Second
)

// Config is the configuration of the applier.
type Config struct {
	Folder string // with manifests, applied in the order of their names; it need not exist
	Record string // the file with what was applied
}

// Applier is the component that applies manifests.
type Applier struct {
	cfg    Config
	log    *slog.Logger
	client kubernetes.Interface
	any    dynamic.Interface
	mapper meta.ResettableRESTMapper

	mu      sync.Mutex // guards failure
	failure error
}

// New returns the applier. client may do everything.
func New(cfg Config, client *rest.Config, log *slog.Logger) (*Applier, error) {
	typed, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the client of manifests: %w", err)
	}
	untyped, err := dynamic.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the client of manifests: %w", err)
	}
	known, err := discovery.NewDiscoveryClientForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the client of manifests: %w", err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(known))
	return &Applier{cfg: cfg, log: log, client: typed, any: untyped, mapper: mapper}, nil
}

// Name implements lifecycle.Component.
func (a *Applier) Name() string { return "manifests" }

// Check implements lifecycle.Checker: it returns why manifests could not be applied yet.
func (a *Applier) Check(context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failure
}

// Run applies new manifests, and then waits for ctx. It calls ready after the first attempt: a manifest that cannot be applied
// must not keep the server from starting.
func (a *Applier) Run(ctx context.Context, ready func()) error {
	logged := ""
	for delay := firstDelay; ; delay = min(2*delay, lastDelay) {
		err := a.applyAll(ctx)
		if ctx.Err() != nil {
			return nil
		}
		a.mu.Lock()
		a.failure = err
		a.mu.Unlock()
		ready()
		if err == nil {
			break
		}
		if err.Error() != logged {
			logged = err.Error()
			a.log.Error("manifests of the bundle could not be applied; trying again", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(delay):
		}
	}
	<-ctx.Done()
	return nil
}

// record is what was applied.
type record struct {
	Cluster types.UID `json:"cluster"` // of the namespace kube-system: another cluster has nothing of it
	Applied []string  `json:"applied"` // hashes of files
}

// file is a manifest.
type file struct {
	name, sum string
	data      []byte
}

// applyAll applies the manifests that are not in the record.
func (a *Applier) applyAll(ctx context.Context) error {
	files, err := a.files()
	if err != nil || len(files) == 0 {
		return err
	}
	system, err := a.client.CoreV1().Namespaces().Get(ctx, metav1.NamespaceSystem, metav1.GetOptions{})
	if err != nil {
		return err
	}
	before := a.read(system.UID)
	now := record{Cluster: system.UID}
	var errs []error
	for _, f := range files {
		if !slices.Contains(before.Applied, f.sum) {
			n, err := a.applyFile(ctx, f)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", f.name, err))
				continue
			}
			a.log.Info("applied a manifest of the bundle", "file", f.name, "objects", n)
		}
		now.Applied = append(now.Applied, f.sum)
	}
	return errors.Join(append(errs, a.write(now))...)
}

// files returns the manifests in the folder, sorted by name.
func (a *Applier) files() (all []file, err error) {
	entries, err := os.ReadDir(a.cfg.Folder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") {
			continue
		}
		data, err := atomicfile.ReadSmall(filepath.Join(a.cfg.Folder, e.Name()), maxManifest)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(data)
		all = append(all, file{e.Name(), hex.EncodeToString(sum[:]), data})
	}
	return all, err
}

// read returns the record of a cluster. A damaged record is no record: the manifests are applied again.
func (a *Applier) read(cluster types.UID) (r record) {
	data, err := atomicfile.ReadSmall(a.cfg.Record, maxRecord)
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		a.log.Warn("the record of applied manifests cannot be read; the manifests of the bundle are applied again", "err", err)
	}
	if err != nil || r.Cluster != cluster {
		return record{}
	}
	return r
}

func (a *Applier) write(r record) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(a.cfg.Record, data, 0o600)
	return err
}

// applyFile applies the objects of a file, and returns their number.
func (a *Applier) applyFile(ctx context.Context, f file) (int, error) {
	objects, err := parse(f.data)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, o := range objects {
		if err := a.apply(ctx, o, f.sum); err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", o.GetKind(), o.GetName(), err))
		}
	}
	if len(errs) > 0 {
		a.mapper.Reset() // a definition may have been created since
	}
	return len(objects), errors.Join(errs...)
}

// apply applies an object of a file with a hash.
func (a *Applier) apply(ctx context.Context, o *unstructured.Unstructured, sum string) error {
	kind := o.GroupVersionKind()
	mapping, err := a.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return err
	}
	var at dynamic.ResourceInterface = a.any.Resource(mapping.Resource)
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		namespace := o.GetNamespace()
		if namespace == "" {
			namespace = metav1.NamespaceDefault
		}
		at = a.any.Resource(mapping.Resource).Namespace(namespace)
	}
	// An error, of a kind that cannot be read say, is one of the patch too if it matters.
	if there, err := at.Get(ctx, o.GetName(), metav1.GetOptions{}); err == nil && there.GetAnnotations()[annotation] == sum {
		return nil
	}
	o.SetAnnotations(with(o.GetAnnotations(), annotation, sum))
	data, err := o.MarshalJSON()
	if err != nil {
		return err
	}
	force := true
	_, err = at.Patch(ctx, o.GetName(), types.ApplyPatchType, data, metav1.PatchOptions{FieldManager: fieldManager, Force: &force})
	return err
}

// with returns a map with one more entry.
func with(m map[string]string, key, value string) map[string]string {
	out := map[string]string{key: value}
	for k, v := range m {
		if k != key {
			out[k] = v
		}
	}
	return out
}

// parse returns the objects in a file; a list stands for its items.
func parse(data []byte) (all []*unstructured.Unstructured, err error) {
	for r, n := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data))), 1; ; n++ {
		text, err := r.Read()
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		var content map[string]any
		if err := yaml.Unmarshal(text, &content); err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
		if len(content) == 0 {
			continue
		}
		o := &unstructured.Unstructured{Object: content}
		if o.GetKind() == "" || o.GetAPIVersion() == "" {
			return nil, fmt.Errorf("document %d has no apiVersion or no kind", n)
		}
		if !o.IsList() {
			all = append(all, o)
			continue
		}
		if err := o.EachListItem(func(item runtime.Object) error {
			all = append(all, item.(*unstructured.Unstructured))
			return nil
		}); err != nil {
			return nil, fmt.Errorf("document %d: %w", n, err)
		}
	}
}
