package datastore

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// TestGuardPuts: every way to write a value below the prefix asks first and reports its end, a refused one writes nothing, and
// other keys are nobody's business.
func TestGuardPuts(t *testing.T) {
	var asked []string
	open := 0
	store := New(testConfig(t.TempDir()), testLog(t))
	store.GuardPuts("/guarded/", func(values [][]byte) (func(), error) {
		for _, v := range values {
			if bytes.HasPrefix(v, []byte("bad")) {
				return nil, errors.New("the value is bad")
			}
			asked = append(asked, string(v))
		}
		open++
		return func() { open-- }, nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- store.Run(ctx, func() { close(ready) }) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	<-ready
	c := newClient(t, store)
	put := clientv3.OpPut
	if _, err := c.Put(t.Context(), "/guarded/a", "put"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Txn(t.Context()).Then(put("/guarded/b", "then"), put("/free/b", "bad")).Else(put("/guarded/b", "else")).Commit(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Txn(t.Context()).Then(clientv3.OpTxn(nil, []clientv3.Op{put("/guarded/c", "inner")}, nil)).Commit(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Put(t.Context(), "/free/a", "bad"); err != nil {
		t.Fatal(err)
	}
	if want := []string{"put", "then", "else", "inner"}; !slices.Equal(asked, want) || open != 0 {
		t.Errorf("asked about %q, want %q; %d writes have not ended", asked, want, open)
	}
	if _, err := c.Put(t.Context(), "/guarded/d", "bad"); err == nil {
		t.Error("a refused value was written")
	}
	if _, err := c.Txn(t.Context()).Then(put("/guarded/d", "bad"), put("/free/d", "good")).Commit(); err == nil {
		t.Error("a transaction with a refused value was carried out")
	}
	for _, key := range []string{"/guarded/d", "/free/d"} {
		if resp, err := c.Client.Get(t.Context(), key); err != nil || resp.Count != 0 {
			t.Errorf("%s: %v, %v", key, resp, err)
		}
	}
}
