package datastore

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"kedge/datastore/integrity"
)

// TestRestoreSnapshot: a restored store has what the snapshot has, hands out higher revisions than ever before, ends watches
// of before, and goes on after a crash.
func TestRestoreSnapshot(t *testing.T) {
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	c := newClient(t, s)
	for _, value := range []string{"1", "2"} {
		if _, err := c.Put(t.Context(), "/a", value); err != nil {
			t.Fatal(err)
		}
	}
	gone, err := c.Put(t.Context(), "/gone", "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Delete(t.Context(), "/gone"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s.db")
	if _, err := s.SaveSnapshot(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	later, err := c.Put(t.Context(), "/later", "x") // a client has seen it, and the snapshot has not
	if err != nil {
		t.Fatal(err)
	}
	stop()
	above, err := HighestRevision(cfg.Dir)
	if err != nil || above < later.Header.Revision {
		t.Fatalf("the highest revision is %d, %v; want %d", above, err, later.Header.Revision)
	}

	restored := testConfig(filepath.Join(t.TempDir(), "store"))
	made, err := RestoreSnapshot(path, restored.Dir, restored.MemberName, above, testLog(t))
	if err != nil || made.Revision <= later.Header.Revision {
		t.Fatalf("restored %+v, %v", made, err)
	}
	for _, again := range []string{"from its seal", "after a crash"} {
		if again == "after a crash" {
			if err := os.Remove(filepath.Join(restored.Dir, integrity.SealFile)); err != nil {
				t.Fatal(err)
			}
		}
		s, stop := start(t, restored)
		c := newClient(t, s)
		got, err := c.Client.Get(t.Context(), "/", clientv3.WithPrefix())
		if err != nil {
			t.Fatalf("%s: %v", again, err)
		}
		values := map[string]string{}
		for _, kv := range got.Kvs {
			if strings.HasPrefix(string(kv.Key), "/kedge/") {
				continue
			}
			values[string(kv.Key)] = string(kv.Value)
		}
		if len(values) != 1 || values["/a"] != "2" || got.Header.Revision < made.Revision {
			t.Errorf("%s: it has %v at revision %d, want /a=2 from %d on", again, values, got.Header.Revision, made.Revision)
		}
		for _, from := range []int64{gone.Header.Revision, later.Header.Revision + 1} {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			resp := <-c.Watch(ctx, "/", clientv3.WithPrefix(), clientv3.WithRev(from))
			cancel()
			if !errors.Is(resp.Err(), rpctypes.ErrCompacted) {
				t.Errorf("%s: a watch from revision %d got %+v, %v", again, from, resp, resp.Err())
			}
		}
		if _, err := c.Put(t.Context(), "/a", "2"); err != nil {
			t.Errorf("%s: %v", again, err)
		}
		stop()
	}
}

func TestRestoreRefusesDamage(t *testing.T) {
	s, stop := start(t, testConfig(t.TempDir()))
	if _, err := newClient(t, s).Put(t.Context(), "/a", "x"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s.db")
	if _, err := s.SaveSnapshot(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	stop()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "store")
	if _, err := RestoreSnapshot(path, dir, "kedge", 0, testLog(t)); err == nil || !strings.Contains(err.Error(), "not as it was written") {
		t.Errorf("a flipped bit: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a refused restore has made %s: %v", dir, err)
	}
}
