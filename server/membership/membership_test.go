package membership

import (
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/server/directory"
	"kedge/server/identity"
)

func whole() joining.State {
	return joining.State{
		Cluster:   joining.Cluster{ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")}, ClusterDomain: "cluster.local"},
		Admission: json.RawMessage(`{"name":"n"}`),
	}
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestJoinedBefore: what a directory says of its server, at each point at which a join may have been cut off.
func TestJoinedBefore(t *testing.T) {
	dir := t.TempDir()
	if _, joined, err := JoinedBefore(dir); joined || err != nil {
		t.Errorf("an empty directory: %v, %v", joined, err)
	}
	put(t, filepath.Join(dir, unfinishedFile), "")
	if _, joined, err := JoinedBefore(dir); joined || !errors.Is(err, ErrUnfinished) {
		t.Errorf("a join that has begun: %v, %v", joined, err)
	}
	// The answer is there, and its credentials are not in files of their own yet.
	told := whole()
	told.Credentials = joining.Credentials{"tls/server-ca.crt": []byte("authority"), "encryption-config.yaml": []byte("key")}
	if err := told.Write(joining.Server, dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "tls"), 0o700); err != nil {
		t.Fatal(err)
	}
	got, joined, err := JoinedBefore(dir)
	if err != nil || !joined || got.Cluster.ClusterDomain != "cluster.local" || got.Admission.Name != "n" {
		t.Errorf("a join whose answer is there: %+v, %v, %v", got, joined, err)
	}
	for name, want := range told.Credentials {
		if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != string(want) {
			t.Errorf("%s has %q, %v", name, data, err)
		}
	}
	data, err := os.ReadFile(joining.StateFile(joining.Server, dir))
	if err != nil || strings.Contains(string(data), "credentials") {
		t.Errorf("the credentials stay in %s: %s, %v", joining.StateFile(joining.Server, dir), data, err)
	}
	if _, err := os.Stat(filepath.Join(dir, unfinishedFile)); err == nil {
		t.Error("the join is still unfinished")
	}
	if _, joined, err := JoinedBefore(dir); !joined || err != nil {
		t.Errorf("after the join: %v, %v", joined, err)
	}
	// A server that was removed has begun to join anew.
	put(t, filepath.Join(dir, unfinishedFile), "")
	if _, joined, err := JoinedBefore(dir); joined || !errors.Is(err, ErrUnfinished) {
		t.Errorf("a second join that has begun: %v, %v", joined, err)
	}
}

// TestDamagedAnswer: a file that is not whole is named, with the exit code of what stays so.
func TestDamagedAnswer(t *testing.T) {
	const noAdmission = `{"cluster":{"clusterCIDRs":["10.42.0.0/16"],"serviceCIDRs":["10.43.0.0/16"],"clusterDomain":"c"}}`
	for name, content := range map[string]string{"empty": "", "half": `{"cluster":{"clu`, "no settings": "{}", "no admission": noAdmission, "another admission": strings.Replace(noAdmission, "{", `{"admission":[],`, 1)} {
		dir := t.TempDir()
		path := joining.StateFile(joining.Server, dir)
		put(t, path, content)
		_, joined, err := JoinedBefore(dir)
		if joined && err == nil || err == nil || !strings.Contains(err.Error(), path) || errorkind.ExitCode(err) != errorkind.ExitConfig {
			t.Errorf("%s: %v, %v (exit code %d)", name, joined, err, errorkind.ExitCode(err))
		}
	}
	if err := LostSettings("/x"); !strings.Contains(err.Error(), "/x/joined.json is missing") {
		t.Error(err)
	}
}

// TestAnswerIsChecked: an answer that lacks a file, has one more, or is another cluster's is not kept.
func TestAnswerIsChecked(t *testing.T) {
	ca, err := pki.EnsureAuthority(t.TempDir(), "server-ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	good := joining.Credentials{}
	files, _ := identity.SharedFiles()
	for _, name := range files {
		good[name] = []byte("x")
	}
	good[identity.AuthorityFile("")] = ca.PEM()
	if err := checkCredentials(good, ca.Cert.Raw); err != nil {
		t.Error(err)
	}
	if err := checkCredentials(good, []byte("another")); !errors.Is(err, joining.ErrWrongCA) {
		t.Errorf("another authority: %v", err)
	}
	more := maps.Clone(good)
	more["../x"] = []byte("x")
	if err := checkCredentials(more, ca.Cert.Raw); err == nil || !strings.Contains(err.Error(), "which no server needs") {
		t.Errorf("one file more: %v", err)
	}
	delete(good, files[len(files)-1])
	if err := checkCredentials(good, ca.Cert.Raw); err == nil || !strings.Contains(err.Error(), "it has no "+files[len(files)-1]) {
		t.Errorf("one file less: %v", err)
	}
}

// TestJoinWithoutToken: a machine that is no server yet needs one, and nothing is begun without.
func TestJoinWithoutToken(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "server")
	j := Joiner{Dir: dir, StoreDir: filepath.Join(dir, "store"), Server: "https://192.0.2.1:6443", NodeName: "n", Forget: func() error { return nil }}
	_, joined, err := j.Join(t.Context(), slog.New(slog.DiscardHandler))
	if joined || !errors.Is(err, joining.ErrNotJoined) {
		t.Errorf("%v, %v", joined, err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a directory was made")
	}
	j.Token = "nonsense"
	if _, _, err := j.Join(t.Context(), slog.New(slog.DiscardHandler)); err == nil || !strings.HasPrefix(err.Error(), "--token: ") {
		t.Errorf("a token that is none: %v", err)
	}
}

// TestRoles: the server's own node gets the label that the kubelet may not give it, once it is there.
func TestRoles(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}}
	client, events := fake.NewClientset(node), watch.NewFakeWithChanSize(2, false)
	client.PrependWatchReactor("nodes", clienttesting.DefaultWatchReactor(events, nil))
	list := directory.New("n", netip.MustParseAddrPort("192.0.2.1:6443"), client, slog.New(slog.DiscardHandler))
	events.Delete(node) // of a node that is gone there is nothing to label
	events.Add(node)
	events.Stop()
	if err := NewRoles("n", nil, list, slog.New(slog.DiscardHandler)).follow(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	patches := 0
	for _, action := range client.Actions() {
		if action.GetVerb() == "patch" {
			patches++
		}
	}
	if patches != 1 {
		t.Errorf("%d patches, want one: a deleted node gets no label", patches)
	}
	got, err := client.CoreV1().Nodes().Get(t.Context(), "n", metav1.GetOptions{})
	if err != nil || got.Labels[roleLabel] != "true" {
		t.Errorf("%v, %v", got.Labels, err)
	}
}
