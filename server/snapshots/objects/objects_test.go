package objects

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	clienttesting "k8s.io/client-go/testing"
	"sigs.k8s.io/yaml"

	"kedge/server/customkinds"
	"kedge/server/snapshots"
	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/s3"
	"kedge/server/snapshots/s3server"
)

// site is a server's folder, and an API that knows the kind once it is defined.
type site struct {
	*testing.T

	api     *dynamicfake.FakeDynamicClient
	defined *atomic.Bool // the kind
	dir     string
	list    *List
}

func newSite(t *testing.T, node string) *site {
	nodes := schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	s := &site{T: t, defined: new(atomic.Bool), dir: filepath.Join(t.TempDir(), "snapshots")}
	s.api = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		kind.Resource: "SnapshotList", customkinds.Definitions: "CustomResourceDefinitionList", nodes: "NodeList",
	})
	s.api.PrependReactor("*", "snapshots", func(clienttesting.Action) (bool, runtime.Object, error) {
		return !s.defined.Load(), nil, apierrors.NewNotFound(kind.Resource.GroupResource(), "")
	})
	s.api.PrependReactor("create", "customresourcedefinitions", func(clienttesting.Action) (bool, runtime.Object, error) {
		s.defined.Store(true)
		return false, nil, nil
	})
	n := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Node", "metadata": map[string]any{"name": "s1", "uid": "uid-of-s1"}}}
	if _, err := s.api.Resource(nodes).Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.list = New(Config{Folder: s.dir, Node: node, Cluster: "c"}, s.api, slog.New(slog.DiscardHandler))
	return s
}

// add writes the file of a snapshot, which has a header only.
func (s *site) add(name, node string, at time.Time) {
	s.Helper()
	header := fmt.Sprintf("kedge snapshot\n{\"format\":1,\"kedge\":\"v9\",\"node\":%q,\"taken\":%q,\"revision\":7,\"openedBy\":\"age1x\"}\n", node, at.Format(time.RFC3339))
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		s.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, name), []byte(header), 0o600); err != nil {
		s.Fatal(err)
	}
}

// objects returns what the API has, by file.
func (s *site) objects() map[string]Status {
	s.Helper()
	found, err := s.api.Resource(kind.Resource).List(s.Context(), metav1.ListOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		s.Fatal(err)
	}
	out := map[string]Status{}
	for i := range found.Items {
		st, _ := statusOf(&found.Items[i])
		out[st.Server+"/"+st.File] = st
	}
	return out
}

func (s *site) update() {
	s.Helper()
	if err := s.list.update(s.Context()); err != nil {
		s.Fatal(err)
	}
}

var noon = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

// TestObjectsFollowFiles: a server lists its own files, and leaves the objects of others alone.
func TestObjectsFollowFiles(t *testing.T) {
	s := newSite(t, "s1")
	s.update()
	if s.defined.Load() {
		t.Error("the kind is defined, although there is no snapshot")
	}
	first, second := archive.FileName("scheduled", "s1", noon), archive.FileName("My_Own", "s1", noon)
	s.add(first, "s1", noon)
	s.add(second, "s1", noon)
	if err := os.WriteFile(filepath.Join(s.dir, "broken.kedge"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.update()
	got := s.objects()
	want := Status{Server: "s1", Place: OnServer, File: first, Bytes: got["s1/"+first].Bytes, Taken: "2026-11-29T12:00:00Z", Revision: 7, Kedge: "v9", OpenedBy: "age1x"}
	if got["s1/"+first] != want || want.Bytes < 50 || len(got) != 3 {
		t.Errorf("%+v", got)
	}
	if b := got["s1/broken.kedge"]; !strings.Contains(b.Message, "no snapshot of kedge") {
		t.Errorf("%+v", b)
	}
	found, err := s.api.Resource(kind.Resource).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range found.Items {
		if owners := o.GetOwnerReferences(); len(owners) != 1 || owners[0].UID != "uid-of-s1" {
			t.Errorf("owners of %s: %v", o.GetName(), owners)
		}
	}

	other := *s
	other.dir = filepath.Join(t.TempDir(), "snapshots")
	other.list = New(Config{Folder: other.dir, Node: "s2", Cluster: "c"}, s.api, slog.New(slog.DiscardHandler))
	other.add(first, "s2", noon) // of the same name
	other.update()
	if err := os.Remove(filepath.Join(s.dir, second)); err != nil {
		t.Fatal(err)
	}
	s.update()
	got = s.objects()
	if _, ok := got["s1/"+second]; ok || len(got) != 3 || got["s2/"+first].Server != "s2" {
		t.Errorf("%+v", got)
	}

	// A file that was replaced.
	s.add(first, "s1", noon.Add(time.Hour))
	s.update()
	if got := s.objects()["s1/"+first].Taken; got != "2026-11-29T13:00:00Z" {
		t.Error(got)
	}
	s.api.ClearActions()
	s.update()
	for _, a := range s.api.Actions() {
		if !slices.Contains([]string{"list", "get"}, a.GetVerb()) {
			t.Errorf("nothing has changed, and it is written: %v", a)
		}
	}
}

// TestFollowsFolder: files that come and go by anybody's hand are noticed, also in a folder that is made later.
func TestFollowsFolder(t *testing.T) {
	s := newSite(t, "s1")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.list.Run(ctx, func() {}) }()
	wait := func(what string, f func(map[string]Status) bool) {
		t.Helper()
		for begin := time.Now(); !f(s.objects()); time.Sleep(10 * time.Millisecond) {
			if time.Since(begin) > time.Minute {
				t.Fatal(what)
			}
		}
	}
	first, second := archive.FileName("a", "s1", noon), archive.FileName("b", "s1", noon)
	s.add(first, "s1", noon)
	s.list.Changed() // as a server says it after its first snapshot
	wait("the first snapshot is not listed", func(all map[string]Status) bool { return len(all) == 1 })
	s.add(second, "s1", noon)
	wait("a file that was copied there is not listed", func(all map[string]Status) bool { return len(all) == 2 })
	if err := os.Remove(filepath.Join(s.dir, first)); err != nil {
		t.Fatal(err)
	}
	wait("a removed file is listed", func(all map[string]Status) bool { _, ok := all["s1/"+first]; return !ok })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestObjectName(t *testing.T) {
	names := map[string]bool{}
	for _, s := range []Status{
		{Place: OnServer, Server: "s1", File: "scheduled-s1-20261129T120000Z.kedge"},
		{Place: InS3, Server: "s1", File: "scheduled-s1-20261129T120000Z.kedge"},
		{Place: OnServer, Server: "s2", File: "scheduled-s1-20261129T120000Z.kedge"},
		{Place: OnServer, Server: "s1", File: "a_b.kedge"}, {Place: OnServer, Server: "s1", File: "a-b.kedge"},
		{Place: OnServer, Server: "s1", File: "ä.kedge"}, {Place: OnServer, Server: "s1", File: strings.Repeat("x", 240) + ".kedge"},
		{Place: OnServer, Server: "s1", File: "before-upgrade-20261129T120000Z.db"},
	} {
		name := objectName(s)
		if wrong := validation.IsDNS1123Subdomain(name); len(wrong) > 0 || names[name] {
			t.Errorf("%+v: %q, %v", s, name, wrong)
		}
		names[name] = true
	}
}

// The API drops what the definition does not have.
func TestDefinitionHasAllFields(t *testing.T) {
	var d struct {
		Spec struct {
			Versions []struct {
				Schema struct {
					OpenAPIV3Schema struct {
						Properties struct {
							Status struct{ Properties map[string]any }
						}
					} `json:"openAPIV3Schema"`
				}
			}
		}
	}
	if err := yaml.Unmarshal(definition, &d); err != nil {
		t.Fatal(err)
	}
	properties, of := d.Spec.Versions[0].Schema.OpenAPIV3Schema.Properties.Status.Properties, reflect.TypeFor[Status]()
	for i := range of.NumField() {
		if name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ","); properties[name] == nil {
			t.Errorf("the definition has no %s", name)
		}
	}
	if len(properties) != of.NumField() {
		t.Errorf("the definition has %d fields, and the type %d", len(properties), of.NumField())
	}
}

// TestTriesAgain: what has failed is tried again.
func TestTriesAgain(t *testing.T) {
	s := newSite(t, "s1")
	s.add(archive.FileName("a", "s1", noon), "s1", noon)
	synctest.Test(t, func(t *testing.T) {
		s.list = New(s.list.cfg, s.api, s.list.log) // with the channels of this bubble
		s.defined.Store(true)
		var refused atomic.Bool
		refused.Store(true)
		s.api.PrependReactor("list", "snapshots", func(clienttesting.Action) (bool, runtime.Object, error) {
			return refused.Load(), nil, apierrors.NewInternalError(fmt.Errorf("away"))
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.list.follow(ctx, func() changes { return changes{} }) }()
		time.Sleep(time.Second)
		refused.Store(false)
		time.Sleep(retryDelay + time.Second)
		if got := s.objects(); len(got) != 1 {
			t.Errorf("%+v", got)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestObjectsOfBucket: the snapshots of this cluster in S3 are listed, and those of others are not. While S3 is away, the list
// stays.
func TestObjectsOfBucket(t *testing.T) {
	server := s3server.Start(t)
	c := s3.DefaultConfig()
	c.Endpoint, c.EndpointCA, c.Bucket, c.Timeout = server.Addr, server.CAFile, s3server.Bucket, 5*time.Second
	c.AccessKey, c.SecretKey = s3server.AccessKey, s3server.SecretKey
	b, err := s3.Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, of := range map[string]string{"ours.kedge": "c", "others.kedge": "another"} {
		err := b.Upload(t.Context(), file, name, map[string]string{
			snapshots.MetaCluster: of, snapshots.MetaNode: "s2", snapshots.MetaTaken: noon.Format(time.RFC3339), snapshots.MetaRevision: "8",
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	s := newSite(t, "s1")
	s.add("local.kedge", "s1", noon)
	var away error
	s.list.cfg.Bucket = func(context.Context) (*s3.Bucket, error) { return b, away }
	s.update()
	want := Status{Server: "s2", Place: InS3, File: "ours.kedge", Bytes: 7, Taken: "2026-11-29T12:00:00Z", Revision: 8}
	if got := s.objects(); len(got) != 2 || got["s2/ours.kedge"] != want {
		t.Errorf("%+v", got)
	}
	away = errors.New("S3 is away")
	s.add("second.kedge", "s1", noon)
	if err := s.list.update(t.Context()); !errors.Is(err, away) {
		t.Error(err)
	}
	if got := s.objects(); len(got) != 3 {
		t.Errorf("while S3 is away: %+v", got)
	}
	away = nil
	if err := b.Remove(t.Context(), "ours.kedge"); err != nil {
		t.Fatal(err)
	}
	s.update()
	if got := s.objects(); len(got) != 2 || got["s2/ours.kedge"] == want {
		t.Errorf("what was removed from S3 is listed: %+v", got)
	}
}
