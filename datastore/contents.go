package datastore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// pageOfKeys is how many keys of a snapshot are read at a time.
const pageOfKeys = 500

// ReadSnapshot verifies a snapshot file, and calls each with every key that begins with one of the prefixes and with its latest
// value, in the order of the keys. etcd's own code reads a copy of the database, in the folder dir; the file itself is not
// changed, and the caller removes dir.
func ReadSnapshot(ctx context.Context, path, dir string, prefixes []string, each func(key string, value []byte) error) (err error) {
	if _, err := VerifySnapshot(path); err != nil {
		return err
	}
	database := filepath.Join(dir, "db")
	if err := copyDatabase(path, database); err != nil {
		return fmt.Errorf("copy %s: %w", path, err)
	}
	defer func() {
		if p := recover(); p != nil { // etcd's answer to a database that it cannot use
			err = fmt.Errorf("read %s: etcd: %v", path, p)
		}
	}()
	log := zap.NewNop().WithOptions(zap.WithFatalHook(zapcore.WriteThenPanic))
	b := backend.NewDefaultBackend(log, database)
	defer func() { err = errors.Join(err, b.Close()) }()
	kv := mvcc.NewStore(log, b, &lease.FakeLessor{}, mvcc.StoreConfig{})
	defer func() { err = errors.Join(err, kv.Close()) }()
	for _, prefix := range prefixes {
		if err := readPrefix(ctx, kv, prefix, each); err != nil {
			return err
		}
	}
	return nil
}

// readPrefix calls each with the keys that begin with prefix.
func readPrefix(ctx context.Context, kv mvcc.ReadView, prefix string, each func(key string, value []byte) error) error {
	end := []byte(clientv3.GetPrefixRangeEnd(prefix))
	for from := []byte(prefix); ; {
		page, err := kv.Range(ctx, from, end, mvcc.RangeOptions{Limit: pageOfKeys})
		if err != nil {
			return err
		}
		for i := range page.KVs {
			var one *mvccpb.KeyValue = page.KVs[i]
			if err := each(string(one.Key), bytes.Clone(one.Value)); err != nil {
				return err
			}
			from = append(bytes.Clone(one.Key), 0)
		}
		if len(page.KVs) < pageOfKeys {
			return nil
		}
	}
}

// copyDatabase writes the database in a snapshot file, which is all of it but the checksum, to a new file.
func copyDatabase(path, database string) error {
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	st, err := from.Stat()
	if err != nil {
		return err
	}
	to, err := os.OpenFile(database, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyN(to, from, st.Size()-sha256.Size)
	return errors.Join(err, to.Close())
}
