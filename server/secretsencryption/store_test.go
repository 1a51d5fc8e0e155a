package secretsencryption

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kedge/datastore"
	"kedge/internal/test/await"
	"kedge/server/identity"
)

// fileAPI is an API server that only reads its file.
type fileAPI struct{}

func (fileAPI) Reload(context.Context) error   { return nil }
func (fileAPI) CaughtUp(context.Context) error { return nil }

// TestControllerOnDatastore carries out a rotation on a real datastore: a change that begins while the controller waits wakes it,
// keys below other prefixes stay, leases too, and the history is deleted.
func TestControllerOnDatastore(t *testing.T) {
	cfg := datastore.DefaultConfig()
	cfg.Dir = t.TempDir()
	db := datastore.New(cfg, slog.New(slog.DiscardHandler))
	open := Etcd(func() (*clientv3.Client, error) {
		c, err := db.NewClient()
		if err != nil {
			return nil, err
		}
		return c.Client, nil
	})
	dir := t.TempDir()
	before := first(t)
	text, err := before.file()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(identity.EncryptionConfigFile(dir), text, 0o600); err != nil {
		t.Fatal(err)
	}
	k := NewKeeper("s1", dir, open, nil, slog.New(slog.DiscardHandler))
	k.SetAPI(fileAPI{})
	db.GuardPuts(prefix, k.Guard)
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 2)
	go func() { done <- db.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	control, stop := context.WithCancel(ctx)
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	if err := k.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	cluster := Cluster{
		Members: func(context.Context) ([]string, error) { return []string{"s1"}, nil },
		APIs:    func() map[string]string { return map[string]string{"s1": "192.0.2.1:6443"} },
	}
	c := NewController(k, nil, cluster, prefix, slog.New(slog.DiscardHandler))
	go func() { done <- c.Run(control, func() {}) }()

	client, err := db.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	lease, err := client.Grant(ctx, 3600)
	if err != nil {
		t.Fatal(err)
	}
	value := func(content string) string {
		v, err := before[0].write(ctx, []byte(content))
		if err != nil {
			t.Fatal(err)
		}
		return string(v)
	}
	const count = 300
	for i := range count {
		if _, err := client.Put(ctx, fmt.Sprintf("%sns/s%d", prefix, i), value(fmt.Sprint("content ", i)), clientv3.WithLease(lease.ID)); err != nil {
			t.Fatal(err)
		}
	}
	large := strings.Repeat("x", 400<<10) // more than one batch
	for i := range 4 {
		if _, err := client.Put(ctx, fmt.Sprintf("%sns/large%d", prefix, i), value(large)); err != nil {
			t.Fatal(err)
		}
	}
	outside, err := client.Client.Put(ctx, "/registry/secrets.example.com/x", value("of a custom resource"))
	if err != nil {
		t.Fatal(err)
	}

	a := NewAdministration(k, nil, cluster)
	if err := a.Begin(ctx, Rotate); err != nil {
		t.Fatal(err)
	}
	await.True(t, "the key is replaced", func() bool {
		st, err := a.Status(ctx)
		return err == nil && st.Stage == "" && st.Key == "key2" && st.Done == count+4
	})
	after, err := k.config()
	if err != nil || names(after.ids()) != "key2, identity" {
		t.Fatalf("%v, %v", after.ids(), err)
	}
	resp, err := client.Client.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil || len(resp.Kvs) != count+4 {
		t.Fatalf("%d Secrets, %v", len(resp.Kvs), err)
	}
	for _, kv := range resp.Kvs {
		want := large
		if i, small := strings.CutPrefix(string(kv.Key), prefix+"ns/s"); small {
			want = "content " + i
			if kv.Lease != int64(lease.ID) {
				t.Errorf("%s has lost its lease", kv.Key)
			}
		}
		if got, err := after[0].read(ctx, kv.Value); err != nil || string(got) != want {
			t.Errorf("%s: %.20q, %v", kv.Key, got, err)
		}
	}
	if resp, err := client.Client.Get(ctx, "/registry/secrets.example.com/x"); err != nil || resp.Kvs[0].ModRevision != outside.Header.Revision {
		t.Errorf("another resource was rewritten: %v, %v", resp, err)
	}
	if _, err := client.Client.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(outside.Header.Revision)); err == nil {
		t.Error("the history with the old values is there")
	}
	// The old key cannot be written any more.
	if _, err := client.Put(ctx, prefix+"ns/late", value("late")); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("a late write with the old key: %v", err)
	}
}
