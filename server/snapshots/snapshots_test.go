package snapshots

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/datastore"
	"kedge/internal/datadir"
	"kedge/internal/joining"
	"kedge/server/identity"
	"kedge/server/snapshots/archive"
)

var quiet = slog.New(slog.DiscardHandler)

// site is a machine with a server's files and its datastore.
type site struct {
	*testing.T

	dataDir string
	node    string
	store   *datastore.Store // nil while it is stopped
	stop    func()
	secrets *fake.Clientset
}

func newSite(t *testing.T, node string) *site {
	s := &site{T: t, dataDir: t.TempDir(), node: node, secrets: fake.NewClientset()}
	s.prepare(false)
	return s
}

func (s *site) dir() string { return filepath.Join(s.dataDir, "server") }

func (s *site) prepare(established bool) {
	s.Helper()
	_, err := identity.Prepare(identity.Config{
		Dir: s.dir(), NodeName: s.node, Established: established, HTTPSPort: 6443, AdvertiseAddress: netip.MustParseAddr("192.0.2.1"),
		ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local", Kubeconfig: filepath.Join(s.dataDir, "kubeconfig"), KubeconfigMode: 0o600,
	}, time.Now())
	if err != nil {
		s.Fatal(err)
	}
}

// run opens the datastore until the returned function is called.
func (s *site) run() (stop func()) {
	s.Helper()
	cfg := datastore.DefaultConfig()
	cfg.Dir, cfg.MemberName = filepath.Join(s.dir(), storeFolder), s.node
	if err := cfg.Validate(); err != nil {
		s.Fatal(err)
	}
	s.store = datastore.New(cfg, quiet)
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.store.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		s.Fatal(err)
	}
	return func() {
		cancel()
		if err := <-done; err != nil {
			s.Error(err)
		}
		s.store = nil
	}
}

func (s *site) put(key, value string) int64 {
	s.Helper()
	c, err := s.store.NewClient()
	if err != nil {
		s.Fatal(err)
	}
	defer c.Close()
	resp, err := c.Client.Put(s.Context(), key, value)
	if err != nil {
		s.Fatal(err)
	}
	return resp.Header.Revision
}

func (s *site) get(key string) string {
	s.Helper()
	c, err := s.store.NewClient()
	if err != nil {
		s.Fatal(err)
	}
	defer c.Close()
	resp, err := c.Client.Get(s.Context(), key)
	if err != nil {
		s.Fatal(err)
	}
	if len(resp.Kvs) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

var cluster = joining.Cluster{
	Servers: []string{"https://192.0.2.1:6443"}, ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.99.0.0/16")},
	ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")}, ClusterDomain: "cluster.local", Backend: "vxlan",
}

func (s *site) saver() *Saver {
	keys := NewKeys(s.secrets.CoreV1().Secrets(metav1.NamespaceSystem), s.dir(), func(archive.Key) {})
	return NewSaver(Config{Folder: filepath.Join(s.dataDir, "snapshots"), ServerDir: s.dir(), Node: s.node, Kedge: "v1", Kubernetes: "v1.37.1", Retention: 2}, cluster, s.store, keys, quiet)
}

func (s *site) save(prefix string) archive.Listed {
	s.Helper()
	saved, err := s.saver().Save(s.Context(), prefix, nil)
	if err != nil {
		s.Fatal(err)
	}
	return saved
}

func (s *site) restore(file string, lock archive.Lock, force bool) (Restored, error) {
	return Restore{DataDir: s.dataDir, File: file, Lock: lock, Node: s.node, Force: force, Log: quiet}.Run(s.Context())
}

func (s *site) read(name string) string {
	s.Helper()
	data, err := os.ReadFile(filepath.Join(s.dir(), name))
	if err != nil {
		s.Fatal(err)
	}
	return string(data)
}

func (s *site) key() archive.Key {
	s.Helper()
	key, err := archive.ReadKey(s.dir())
	if err != nil {
		s.Fatal(err)
	}
	return key
}

// entries are the names in the data directory.
func (s *site) entries() (names []string) {
	s.Helper()
	all, err := os.ReadDir(s.dataDir)
	if err != nil {
		s.Fatal(err)
	}
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// TestRestoreOnTheSameMachine comes back to an earlier state, twice, and never hands out a revision a second time.
func TestRestoreOnTheSameMachine(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	s.put("/a", "then")
	saved := s.save("daily")
	last := s.put("/a", "later")
	stop()
	nodeKey := s.read("tls/serving-kubelet.key")
	for range 2 {
		done, err := s.restore(saved.Path, s.key(), false)
		if err != nil {
			t.Fatal(err)
		}
		if done.Revision <= last || done.NewNode || !strings.HasPrefix(filepath.Base(done.Kept), keptPrefix) {
			t.Errorf("%+v after revision %d", done, last)
		}
		if s.read("tls/serving-kubelet.key") != nodeKey {
			t.Error("the node has another key")
		}
		s.prepare(true)
		if _, err := os.Stat(joining.StateFile(joining.Server, s.dir())); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the first server has the settings of a joined one: %v", err)
		}
		stop := s.run()
		if got := s.get("/a"); got != "then" {
			t.Errorf("/a is %q", got)
		}
		next := s.put("/a", "again")
		if next <= last {
			t.Errorf("revision %d after %d", next, last)
		}
		last = next
		stop()
		if got := s.entries(); slices.Contains(got, newFolder) || slices.Contains(got, pendingFile) {
			t.Errorf("left: %v", got)
		}
		time.Sleep(time.Second) // the names of what is kept have whole seconds
	}
}

// TestRestoreOnABareMachine: nothing but the file and the key is needed, and a machine of another name gets a key of its own.
func TestRestoreOnABareMachine(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	s.put("/a", "then")
	saved := s.save("daily")
	stop()
	for _, node := range []string{"one", "two"} {
		bare := &site{T: t, dataDir: filepath.Join(t.TempDir(), "kedge"), node: node}
		done, err := bare.restore(saved.Path, s.key(), false)
		if err != nil {
			t.Fatal(err)
		}
		if done.NewNode != (node == "two") || done.Kept != "" {
			t.Errorf("%s: %+v", node, done)
		}
		for _, name := range []string{"tls/server-ca.key", "tls/service-account.key", "encryption-config.yaml", archive.KeyFile} {
			if bare.read(name) != s.read(name) {
				t.Errorf("%s: %s is another", node, name)
			}
		}
		if same := bare.read("tls/serving-kubelet.key") == s.read("tls/serving-kubelet.key"); same != (node == "one") {
			t.Errorf("%s has the node's key: %v", node, same)
		}
		state, joined, err := joining.ReadState(joining.Server, bare.dir())
		if err != nil || !joined || len(state.Cluster.ClusterCIDRs) != 1 || state.Cluster.ClusterCIDRs[0] != cluster.ClusterCIDRs[0] {
			t.Errorf("%s: the settings are %+v, %v", node, state, err)
		}
		bare.prepare(true)
		stop := bare.run()
		if got := bare.get("/a"); got != "then" {
			t.Errorf("%s: /a is %q", node, got)
		}
		stop()
		st, err := os.Stat(bare.dir())
		if err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", node, st.Mode(), err)
		}
	}
}

// TestRestoreRefused: what is wrong is said, and nothing has changed.
func TestRestoreRefused(t *testing.T) {
	s, other := newSite(t, "one"), newSite(t, "other")
	stop := s.run()
	s.put("/a", "then")
	saved := s.save("daily")
	stop()
	stop = other.run()
	other.put("/a", "of another cluster")
	foreign := other.save("daily")
	stop()
	data, err := os.ReadFile(saved.Path)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, data []byte) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	flipped := bytes.Clone(data)
	flipped[len(flipped)-100] ^= 1
	before := s.tree()
	for what, c := range map[string]struct {
		file string
		lock archive.Lock
		want error
	}{
		"a wrong key":     {saved.Path, other.key(), archive.ErrWrongKey},
		"a passphrase":    {saved.Path, archive.Passphrase("correct horse battery"), archive.ErrWrongKey},
		"cut off":         {write("cut.kedge", data[:len(data)-1]), s.key(), archive.ErrDamaged},
		"flipped":         {write("flipped.kedge", flipped), s.key(), archive.ErrDamaged},
		"a later format":  {write("newer.kedge", bytes.Replace(data, []byte(`"format":1`), []byte(`"format":2`), 1)), s.key(), archive.ErrNewer},
		"no snapshot":     {write("text", []byte("text")), s.key(), archive.ErrNotArchive},
		"another cluster": {foreign.Path, other.key(), ErrOtherCluster},
		"a missing file":  {filepath.Join(t.TempDir(), "x"), s.key(), fs.ErrNotExist},
	} {
		if _, err := s.restore(c.file, c.lock, false); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
		if after := s.tree(); after != before {
			t.Errorf("%s has changed\n%s\nto\n%s", what, before, after)
		}
	}
	lock, err := datadir.TryLock(s.dataDir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.restore(saved.Path, s.key(), false); !errors.Is(err, datadir.ErrInUse) {
		t.Errorf("while it runs: %v", err)
	}
	lock.Close()
	if _, err := s.restore(foreign.Path, other.key(), true); err != nil {
		t.Errorf("with force: %v", err)
	}
	stop = s.run()
	defer stop()
	if got := s.get("/a"); got != "of another cluster" {
		t.Errorf("/a is %q", got)
	}
}

// tree describes all files of the data directory but those that are locks.
func (s *site) tree() string {
	s.Helper()
	var out strings.Builder
	err := filepath.WalkDir(s.dataDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, "lock") {
			return err
		}
		info, err := d.Info()
		if err == nil {
			out.WriteString(path + " " + info.ModTime().String() + "\n")
		}
		return err
	})
	if err != nil {
		s.Fatal(err)
	}
	return out.String()
}

// TestRestoreInterrupted leaves what a process leaves that was killed before and after the exchange.
func TestRestoreInterrupted(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	s.put("/a", "then")
	saved := s.save("daily")
	s.put("/a", "later")
	stop()
	key := s.key()
	r := Restore{DataDir: s.dataDir, File: saved.Path, Lock: key, Node: s.node, Log: quiet}
	rec := record{ID: "x", Restored: time.Now().Add(-time.Hour)}

	// Before: the old state is in use.
	if err := writeRecord(filepath.Join(s.dataDir, pendingFile), rec); err != nil {
		t.Fatal(err)
	}
	if _, err := r.build(saved.Header, previous{exists: true, files: map[string][]byte{}}, rec, time.Now()); err != nil {
		t.Fatal(err)
	}
	s.prepare(true)
	stop = s.run()
	if got := s.get("/a"); got != "later" {
		t.Errorf("before the exchange /a is %q", got)
	}
	stop()

	// After: the new one is.
	if err := r.exchange(); err != nil {
		t.Fatal(err)
	}
	s.prepare(true)
	stop = s.run()
	if got := s.get("/a"); got != "then" {
		t.Errorf("after the exchange /a is %q", got)
	}
	stop()

	// The next restore tidies up, and keeps both.
	if _, err := s.restore(saved.Path, key, false); err != nil {
		t.Fatal(err)
	}
	var kept []string
	for _, name := range s.entries() {
		if strings.HasPrefix(name, keptPrefix) {
			kept = append(kept, name)
		}
		if name == newFolder || name == pendingFile {
			t.Errorf("%s is left", name)
		}
	}
	if len(kept) != 2 {
		t.Errorf("kept: %v", kept)
	}
}

// TestRestoreDatabaseOnly restores what is saved before an upgrade.
func TestRestoreDatabaseOnly(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	s.put("/a", "then")
	path := filepath.Join(t.TempDir(), "before-upgrade-1.db")
	if _, err := s.store.SaveSnapshot(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	s.put("/a", "later")
	stop()
	if _, err := s.restore(path, nil, false); err != nil {
		t.Fatal(err)
	}
	s.prepare(true)
	stop = s.run()
	if got := s.get("/a"); got != "then" {
		t.Errorf("/a is %q", got)
	}
	stop()
	bare := &site{T: t, dataDir: t.TempDir(), node: "one"}
	if _, err := bare.restore(path, nil, false); err == nil || !strings.Contains(err.Error(), "none of the keys") {
		t.Errorf("on a bare machine: %v", err)
	}
	stop = s.run()
	s.put("/bootstrap/1234", "the keys of a cluster")
	foreign := filepath.Join(t.TempDir(), "k3s.db")
	if _, err := s.store.SaveSnapshot(t.Context(), foreign); err != nil {
		t.Fatal(err)
	}
	stop()
	if _, err := s.restore(foreign, nil, true); err == nil || !strings.Contains(err.Error(), "kedge import k3s") {
		t.Errorf("of k3s: %v", err)
	}
	// Without its keys the database is worth nothing, whatever is forced.
	if err := os.WriteFile(identity.AuthorityFile(s.dir()), []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, force := range []bool{false, true} {
		if _, err := s.restore(path, nil, force); err == nil || !strings.Contains(err.Error(), "the keys that belong to it cannot be used") {
			t.Errorf("where the authority is damaged, force %v: %v", force, err)
		}
	}
}

// rotating is a datastore during whose snapshots the key of Secrets is replaced.
type rotating struct {
	*datastore.Store
	path string
	left int // how often
}

func (r *rotating) SaveSnapshot(ctx context.Context, path string) (datastore.Snapshot, error) {
	if r.left > 0 {
		r.left--
		if err := os.WriteFile(r.path, fmt.Appendf(nil, "key %d", r.left), 0o600); err != nil {
			return datastore.Snapshot{}, err
		}
	}
	return r.Store.SaveSnapshot(ctx, path)
}

// TestKeysOfTheDatabase: a snapshot has the keys that were there before and after its database was saved.
func TestKeysOfTheDatabase(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	defer stop()
	s.put("/a", "x")
	saver := s.saver()
	source := &rotating{Store: s.store, path: filepath.Join(s.dir(), "encryption-config.yaml"), left: keyAttempts - 1}
	saver.source = source
	saved, err := saver.Save(t.Context(), "daily", nil)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(saved.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := archive.Read(f, s.key(), io.Discard)
	if err != nil || string(c.Files["encryption-config.yaml"]) != "key 0" || source.left != 0 {
		t.Errorf("it has %q, %v", c.Files["encryption-config.yaml"], err)
	}
	source.left = keyAttempts
	if _, err := saver.Save(t.Context(), "weekly", nil); err == nil || !strings.Contains(err.Error(), "being replaced") {
		t.Errorf("while keys are replaced all the time: %v", err)
	}
}

func TestRecoveryKey(t *testing.T) {
	secrets := fake.NewClientset().CoreV1().Secrets(metav1.NamespaceSystem)
	one, two, made := t.TempDir(), t.TempDir(), 0
	first := NewKeys(secrets, one, func(archive.Key) { made++ })
	key, err := first.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	again, err := NewKeys(secrets, two, func(archive.Key) { made++ }).Current(t.Context())
	if err != nil || again.Reveal() != key.Reveal() || made != 1 {
		t.Errorf("another server has %v, %v, and %d keys were made", again, err, made)
	}
	earlier, replaced, err := first.New(t.Context())
	if err != nil || earlier.Reveal() != key.Reveal() || replaced.Reveal() == key.Reveal() {
		t.Errorf("replaced %v by %v, %v", earlier, replaced, err)
	}
	for _, dir := range []string{one, two} {
		if got, err := NewKeys(secrets, dir, nil).Current(t.Context()); err != nil || got.Reveal() != replaced.Reveal() {
			t.Errorf("after that a server has %v, %v", got, err)
		}
		if got, err := archive.ReadKey(dir); err != nil || got.Reveal() != replaced.Reveal() {
			t.Errorf("in its file it has %v, %v", got, err)
		}
	}
	// Without the Secret the servers have the key still.
	if err := secrets.Delete(t.Context(), secretName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, err := NewKeys(secrets, two, func(archive.Key) {}).Current(t.Context()); err != nil || got.Reveal() != replaced.Reveal() {
		t.Errorf("without its Secret the key is %v, %v", got, err)
	}
	s, err := secrets.Get(t.Context(), secretName, metav1.GetOptions{})
	if err != nil || apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
	s.Data[secretData] = []byte("x")
	if _, err := secrets.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Current(t.Context()); err == nil || !strings.Contains(err.Error(), "recovery-key new") {
		t.Errorf("a damaged Secret: %v", err)
	}
	if earlier, _, err := first.New(t.Context()); err != nil || !earlier.IsZero() {
		t.Errorf("a damaged Secret is not replaced: %v, %v", earlier, err)
	}
}

// TestSaveLeavesNothing: what was interrupted is removed by the next snapshot, and what is no snapshot stays.
func TestSaveLeavesNothing(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	defer stop()
	folder := filepath.Join(s.dataDir, "snapshots")
	if err := os.Mkdir(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".tmp-daily-one-20260101T000000Z.kedge", ".plain-daily-one-20260101T000000Z.kedge", "mine.txt"} {
		if err := os.WriteFile(filepath.Join(folder, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.put("/a", "x")
	saved := s.save("daily")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.saver().Save(ctx, "stopped", nil); err == nil {
		t.Error("a snapshot was taken after the end")
	}
	if _, err := s.saver().Save(t.Context(), "../x", nil); err == nil {
		t.Error("a snapshot was taken outside of the folder")
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{filepath.Base(saved.Path), "mine.txt"}; !slices.Equal(names, want) {
		t.Errorf("the folder has %v, want %v", names, want)
	}
	if st, err := os.Stat(saved.Path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file's mode: %v, %v", st.Mode(), err)
	}
}
