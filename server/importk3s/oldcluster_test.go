package importk3s

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apiextensionsv1beta1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1beta1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/yaml"

	"kedge/datastore"
)

const (
	testSecret = "correct-horse"
	testToken  = "K10aaaabbbb::server:" + testSecret
)

// oldConfig is an encryption configuration as k3s writes it.
var oldConfig = fmt.Sprintf(`{"kind":"EncryptionConfiguration","apiVersion":"apiserver.config.k8s.io/v1","resources":[{"resources":["secrets"],"providers":[
	{"aescbc":{"keys":[{"name":"aescbckey","secret":%q}]}},{"identity":{}}]}]}`, base64.StdEncoding.EncodeToString([]byte("0123456789abcdef0123456789abcdef")))

// folders are where the API server stores the kinds of the test's objects.
var folders = map[string]string{
	"Namespace": "namespaces", "Secret": "secrets", "ConfigMap": "configmaps", "ServiceAccount": "serviceaccounts", "Service": "services/specs",
	"Endpoints": "services/endpoints", "PersistentVolume": "persistentvolumes", "PersistentVolumeClaim": "persistentvolumeclaims", "Pod": "pods",
	"Node": "minions", "Event": "events", "Lease": "leases", "Deployment": "deployments", "ReplicaSet": "replicasets", "DaemonSet": "daemonsets",
	"Job": "jobs", "ClusterRole": "clusterroles", "StorageClass": "storageclasses", "Ingress": "ingress", "IngressClass": "ingressclasses", "EndpointSlice": "endpointslices",
	"CustomResourceDefinition": "apiextensions.k8s.io/customresourcedefinitions", "APIService": "apiregistration.k8s.io/apiservices",
	"ClusterRoleBinding": "clusterrolebindings", "RoleBinding": "rolebindings", "StatefulSet": "statefulsets", "CronJob": "cronjobs",
	"NetworkPolicy": "networkpolicies", "PodDisruptionBudget": "poddisruptionbudgets", "HorizontalPodAutoscaler": "horizontalpodautoscalers",
	"LimitRange": "limitranges", "ResourceQuota": "resourcequotas", "PriorityClass": "priorityclasses",
	"ValidatingWebhookConfiguration": "validatingwebhookconfigurations",
}

// keyOf returns the key under which k3s's API server stores an object.
func keyOf(t *testing.T, u *unstructured.Unstructured) string {
	t.Helper()
	folder, ok := folders[u.GetKind()]
	if group := u.GroupVersionKind().Group; !ok && strings.Contains(group, ".") {
		folder, ok = group+"/"+strings.ToLower(u.GetKind())+"s", true
	}
	if !ok {
		t.Fatalf("say in folders where %s is stored", u.GetKind())
	}
	return registry + strings.Trim(folder+"/"+u.GetNamespace(), "/") + "/" + u.GetName()
}

// encoded returns an object as the API server writes it: its own types in protobuf, custom resources and API services in JSON,
// and definitions in JSON and in v1beta1.
func encoded(t *testing.T, u *unstructured.Unstructured) []byte {
	t.Helper()
	if u.GetKind() == "CustomResourceDefinition" {
		var err error
		if u, err = newDecoder().convert(u, apiextensionsv1beta1.SchemeGroupVersion); err != nil {
			t.Fatal(err)
		}
	}
	typed, err := scheme.Scheme.New(u.GroupVersionKind())
	if err != nil {
		data, err := u.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(u.Object, typed, true); err != nil {
		t.Fatalf("%s %s: %v", u.GetKind(), u.GetName(), err)
	}
	var out bytes.Buffer
	if err := protobuf.NewSerializer(scheme.Scheme, scheme.Scheme).Encode(typed, &out); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// objectsIn returns the objects in a text of YAML documents. Each gets a UID, and what an API server adds.
func objectsIn(t *testing.T, text string) (all []*unstructured.Unstructured) {
	t.Helper()
	for n, doc := range strings.Split(text, "\n---\n") {
		u := &unstructured.Unstructured{}
		data, err := yaml.YAMLToJSON([]byte(doc))
		if err == nil {
			err = utiljson.Unmarshal(data, &u.Object)
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, doc)
		}
		if u.GetUID() == "" {
			u.SetUID(types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", n)))
		}
		u.SetCreationTimestamp(metav1.NewTime(time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)))
		u.SetManagedFields([]metav1.ManagedFieldsEntry{{Manager: "k3s", Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1"}})
		all = append(all, u)
	}
	return all
}

// oldStore is what the store of a k3s cluster has.
type oldStore struct {
	objects   []*unstructured.Unstructured
	config    string // encrypts Secrets; empty for no encryption
	secret    string // encrypts the bootstrap data; empty for none of it
	plainFile bool   // bootstrap data as old versions of k3s write it
}

// snapshot runs etcd with the store, and returns the path of a snapshot of it, as k3s takes it. Each object was written twice, and
// one was deleted.
func (o oldStore) snapshot(t *testing.T) string {
	t.Helper()
	store, stop := startEtcd(t)
	defer stop()
	client, err := store.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	put := func(key string, data []byte) {
		t.Helper()
		if _, err := client.Put(t.Context(), key, string(data)); err != nil {
			t.Fatal(err)
		}
	}
	var encrypt *decrypter
	if o.config != "" {
		if encrypt, err = newDecrypter(t.Context(), []byte(o.config), t.TempDir()); err != nil {
			t.Fatal(err)
		}
	}
	for _, u := range o.objects {
		key, data := keyOf(t, u), encoded(t, u)
		if u.GetKind() == "Secret" && encrypt != nil {
			if data, err = encrypt.transformers.TransformerForResource(encrypt.resourceOf(key)).TransformToStorage(t.Context(), data, value.DefaultContext(key)); err != nil {
				t.Fatal(err)
			}
		}
		put(key, []byte("an earlier value"))
		put(key, data)
	}
	put("/registry/configmaps/default/deleted", []byte("a value that is deleted"))
	if _, err := client.Delete(t.Context(), "/registry/configmaps/default/deleted"); err != nil {
		t.Fatal(err)
	}
	put("/registry/ranges/serviceips", []byte("no object"))
	put("compact_rev_key", []byte("7"))
	if o.secret != "" {
		put(bootstraps+hashOf(o.secret), o.bootstrap(t))
	}
	path := filepath.Join(t.TempDir(), "etcd-snapshot-old-1714564800")
	if _, err := store.SaveSnapshot(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// bootstrap returns the bootstrap data: SALT:BASE64(NONCE, AES-GCM of a JSON object with files).
func (o oldStore) bootstrap(t *testing.T) []byte {
	t.Helper()
	type file struct {
		Timestamp time.Time
		Content   []byte
	}
	files := map[string]any{"ServerCA": file{time.Now(), []byte("a certificate")}}
	if o.config != "" {
		files[configName] = file{time.Now(), []byte(o.config)}
		if o.plainFile {
			files[configName] = []byte(o.config)
		}
	}
	data, err := json.Marshal(files)
	if err != nil {
		t.Fatal(err)
	}
	const salt = "0011223344556677"
	gcm, err := cipherOf(o.secret, []byte(salt))
	if err != nil {
		t.Fatal(err)
	}
	nonce := make([]byte, gcm.NonceSize())
	rand.Read(nonce)
	return []byte(salt + ":" + base64.StdEncoding.EncodeToString(gcm.Seal(nonce, nonce, data, nil)))
}

// startEtcd runs a server of etcd until the returned function is called.
func startEtcd(t *testing.T) (*datastore.Store, func()) {
	t.Helper()
	cfg := datastore.DefaultConfig()
	cfg.Dir, cfg.MemberName = filepath.Join(t.TempDir(), "store"), "old"
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	store := datastore.New(cfg, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- store.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	return store, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// zipped compresses a snapshot as k3s does, and returns the path.
func zipped(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	z := zip.NewWriter(&out)
	w, err := z.CreateHeader(&zip.FileHeader{Name: filepath.Base(path), Method: zip.Deflate})
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = z.Close()
	}
	if err == nil {
		err = os.WriteFile(path+".zip", out.Bytes(), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path + ".zip"
}
