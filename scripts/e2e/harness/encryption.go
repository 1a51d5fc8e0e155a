package harness

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"

	"kedge/internal/control"
)

// Encryption returns how Secrets are encrypted. While the server cannot say, the stage is the error.
func (n *Node) Encryption(t *testing.T) (s control.SecretsEncryption) {
	t.Helper()
	if err := control.Get(t.Context(), n.RunDir(), control.SecretsEncryptionPath, nil, &s); err != nil {
		s.Stage = err.Error()
	}
	return s
}

// SecretKeys returns how many Secrets each key has encrypted. It reads the datastore's file, or a snapshot if the server runs.
func (n *Node) SecretKeys(t *testing.T) map[string]int {
	t.Helper()
	path := filepath.Join(n.DataDir(), "server/store/member/snap/db")
	var saved control.SavedSnapshot
	switch err := control.Post(t.Context(), n.RunDir(), control.SaveSnapshotPath, url.Values{"name": {"keys.db"}}, &saved); {
	case err == nil:
		path = filepath.Join(n.DataDir(), "snapshots/keys.db")
		defer os.Remove(path)
	case !errors.Is(err, control.ErrNotRunning):
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	latest := map[string][]byte{}
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("key")).ForEach(func(revision, data []byte) error { // in the order of revisions
			var kv mvccpb.KeyValue
			if err := proto.Unmarshal(data, &kv); err != nil {
				return err
			}
			if len(revision) < 17 || binary.BigEndian.Uint64(revision) == 0 {
				return fmt.Errorf("%x is not a revision", revision)
			}
			if bytes.HasPrefix(kv.Key, []byte("/registry/secrets/")) {
				latest[string(kv.Key)] = kv.Value
				if len(revision) > 17 { // a deletion
					delete(latest, string(kv.Key))
				}
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]int{}
	for _, value := range latest {
		name := "plain"
		if rest, ok := bytes.CutPrefix(value, []byte("k8s:enc:secretbox:v1:")); ok {
			name, _, _ = strings.Cut(string(rest[:20]), ":")
		}
		keys[name]++
	}
	return keys
}
