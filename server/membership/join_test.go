package membership

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes/fake"

	"kedge/datastore"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/server/identity"
	"kedge/server/join"
)

// first is the first server of a cluster: its files and the service that admits machines, behind a listener with TLS.
type first struct {
	*Servers // for its credentials
	*join.Service
	url string

	admitted []string
}

// URLs implements join.Servers.
func (f *first) URLs() []string { return []string{f.url} }

// Admit implements join.Servers.
func (f *first) Admit(_ context.Context, name string, peers []netip.AddrPort) (json.RawMessage, error) {
	f.admitted = append(f.admitted, name)
	return json.Marshal(datastore.Admission{Cluster: "1a", Name: name, ID: "2b", URL: "http://127.0.0.2:2380", Members: []datastore.Peer{}})
}

func newFirst(t *testing.T) *first {
	t.Helper()
	dir, address := t.TempDir(), netip.MustParseAddr("127.0.0.1")
	id, err := identity.Prepare(identity.Config{
		Dir: dir, NodeName: "s1", HTTPSPort: 6443, AdvertiseAddress: address, NodeIPs: []netip.Addr{address},
		ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Kubeconfig: filepath.Join(dir, "kubeconfig"), KubeconfigMode: 0o600, KubeconfigName: "default",
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	f := &first{Servers: &Servers{dir: dir}}
	f.Service = join.New(join.Config{
		ServerCA: id.ServerCA, ClientCA: id.ClientCA, KubeletCA: id.KubeletCA, Cluster: whole().Cluster, Servers: f, Life: join.Life,
	}, fake.NewClientset(), slog.New(slog.DiscardHandler))
	pair, err := id.ServerCA.EnsureLeaf(t.TempDir(), "api", pki.Leaf{CommonName: "api", IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(f.Handler(http.NotFoundHandler()))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	f.url = srv.URL
	return f
}

// joiner is a machine in the data directory dir, with a token for servers.
func (f *first) joiner(t *testing.T, dir string) Joiner {
	t.Helper()
	made, err := f.Tokens().Create(t.Context(), f.CAHash(), join.Spec{Role: joining.Server, TTL: time.Hour, Uses: 1})
	if err != nil {
		t.Fatal(err)
	}
	server := filepath.Join(dir, "server")
	return Joiner{
		Dir: server, StoreDir: filepath.Join(server, "store"), Server: f.url, Token: made.Reveal(), NodeName: "s2",
		Peers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:2380")}, Forget: func() error { return nil },
	}
}

func (j Joiner) try(t *testing.T) (Joined, bool, error) {
	t.Helper()
	return j.Join(t.Context(), slog.New(slog.DiscardHandler))
}

// TestServerJoins: a machine has the cluster's files and what its store needs after a join, and does not join twice.
func TestServerJoins(t *testing.T) {
	f := newFirst(t)
	j := f.joiner(t, t.TempDir())
	joined, begun, err := j.try(t)
	if err != nil || !begun || joined.Admission.Name != "s2" || joined.Cluster.ClusterDomain != "cluster.local" {
		t.Fatalf("%+v, %v, %v", joined, begun, err)
	}
	shared, _ := identity.SharedFiles()
	for _, name := range shared {
		want, err := os.ReadFile(filepath.Join(f.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(j.Dir, name)); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s is not that of the first server: %v", name, err)
		}
	}
	if again, yes, err := JoinedBefore(j.Dir); err != nil || !yes || again.Admission.ID != joined.Admission.ID {
		t.Errorf("the next start reads %+v, %v, %v", again, yes, err)
	}
	j.Token = ""
	if _, begun, err := j.try(t); begun || err != nil {
		t.Errorf("a second join without a token: %v, %v", begun, err)
	}
	if len(f.admitted) != 1 {
		t.Errorf("admitted %v", f.admitted)
	}
}

// TestJoinIsCutOff: a machine that was cut off in its join joins with the same token, because its key is the same, and is not
// taken for the first server of a new cluster meanwhile.
func TestJoinIsCutOff(t *testing.T) {
	f := newFirst(t)
	j := f.joiner(t, t.TempDir())
	if err := os.MkdirAll(filepath.Join(j.Dir, joinedDir), 0o700); err != nil { // the state cannot be written
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, begun, err := j.Join(ctx, slog.New(slog.DiscardHandler)); begun || err == nil {
		t.Fatalf("%v, %v", begun, err)
	}
	if err := os.Remove(filepath.Join(j.Dir, joinedDir)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := JoinedBefore(j.Dir); !errors.Is(err, ErrUnfinished) {
		t.Errorf("after a join that was cut off: %v", err)
	}
	if _, begun, err := j.try(t); !begun || err != nil {
		t.Errorf("the second try: %v, %v", begun, err)
	}
	if _, err := os.Stat(filepath.Join(j.Dir, unfinishedFile)); err == nil {
		t.Error("the join is still unfinished")
	}
}

// joinedDir is what stands in the way of the state: a temporary file of that name cannot be replaced.
const joinedDir = ".tmp-joined.json/x"

// TestRemovedServerJoinsAnew: a server that was removed joins with a new token and keeps its old store; without a token, or
// with that of another cluster, it does not.
func TestRemovedServerJoinsAnew(t *testing.T) {
	f := newFirst(t)
	dir := t.TempDir()
	j := f.joiner(t, dir)
	if _, _, err := j.try(t); err != nil {
		t.Fatal(err)
	}
	other := newFirst(t).joiner(t, dir)
	if _, begun, err := other.try(t); begun || !errors.Is(err, joining.ErrOtherCluster) || errorkind.ExitCode(err) != errorkind.ExitConfig {
		t.Errorf("a token for another cluster: %v, %v", begun, err)
	}
	put(t, filepath.Join(j.StoreDir, "removed"), "")
	if removed, err := datastore.Removed(j.StoreDir); !removed || err != nil {
		t.Fatalf("the store counts as removed: %v, %v", removed, err)
	}
	j.Token = ""
	if _, begun, err := j.try(t); begun || err != nil {
		t.Errorf("without a token: %v, %v", begun, err)
	}
	forgotten := false
	anew := f.joiner(t, dir)
	anew.Forget = func() error { forgotten = true; return nil }
	if _, begun, err := anew.try(t); !begun || err != nil || !forgotten {
		t.Errorf("with a new token: %v, %v; the store is forgotten: %v", begun, err, forgotten)
	}
	if kept, err := filepath.Glob(j.StoreDir + ".removed-*"); len(kept) != 1 || err != nil {
		t.Errorf("kept beside: %v, %v", kept, err)
	}
	if len(f.admitted) != 2 {
		t.Errorf("admitted %v", f.admitted)
	}
}
