package importk3s

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"kedge/datastore"
)

const (
	registry   = "/registry/"
	bootstraps = "/bootstrap/"
)

// Source is a snapshot of k3s's etcd, and what decrypts its Secrets. Nothing is needed if k3s did not encrypt them.
type Source struct {
	File   string // as "k3s etcd-snapshot save" writes it; also compressed by it, as .zip
	Token  string // k3s's server token, which decrypts the encryption configuration in the snapshot
	Config []byte // the encryption configuration itself; empty for that in the snapshot
}

// Snapshot is what was read from a snapshot file.
type Snapshot struct {
	objects []*object
	unread  []Entry // values that could not be read
}

// object is an object of the old cluster.
type object struct {
	*unstructured.Unstructured
	key string // in etcd
}

// stored is a value in etcd.
type stored struct {
	key   string
	value []byte
}

// Read reads a snapshot file. A value that cannot be decrypted or decoded is no error: the import reports it.
func Read(ctx context.Context, s Source) (*Snapshot, error) {
	dir, err := os.MkdirTemp("", "kedge-import-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path, err := unzipped(s.File, dir)
	if err != nil {
		return nil, err
	}
	var values, keys []stored
	encrypted := ""
	err = datastore.ReadSnapshot(ctx, path, dir, []string{bootstraps, registry}, func(key string, value []byte) error {
		if strings.HasPrefix(key, bootstraps) {
			keys = append(keys, stored{key, value})
			return nil
		}
		if isEncrypted(value) && encrypted == "" {
			encrypted = key
		}
		values = append(values, stored{key, value})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s is no usable snapshot of etcd: %w", s.File, err)
	}
	if len(values) == 0 {
		return nil, fmt.Errorf("%s has no objects of Kubernetes: no key begins with %s", s.File, registry)
	}
	d, err := s.decrypter(ctx, keys, encrypted, dir)
	if err != nil {
		return nil, err
	}
	return decodeAll(ctx, values, d), nil
}

// decrypter returns what decrypts values. encrypted is the key of an encrypted value; empty if there is none.
func (s Source) decrypter(ctx context.Context, keys []stored, encrypted, dir string) (*decrypter, error) {
	config := s.Config
	if len(config) == 0 && s.Token != "" { // also if nothing is encrypted: a wrong token is a mistake
		var err error
		if config, err = configOf(keys, s.Token); err != nil {
			return nil, err
		}
	}
	switch {
	case encrypted == "":
		return &decrypter{}, nil
	case len(config) == 0 && s.Token != "":
		return nil, fmt.Errorf("%s is encrypted, and the snapshot has no encryption configuration; give that of k3s with --encryption-config", encrypted)
	case len(config) == 0:
		return nil, fmt.Errorf("%s is encrypted; give k3s's server token with --token-file, or its encryption configuration with --encryption-config", encrypted)
	}
	return newDecrypter(ctx, config, dir)
}

// unzipped returns the path of a snapshot: the file itself, or its content in dir if it is compressed.
func unzipped(path, dir string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	magic := make([]byte, 4)
	if _, err := io.ReadFull(f, magic); err != nil {
		return "", fmt.Errorf("%s is no snapshot: %w", path, err)
	}
	if string(magic) != "PK\x03\x04" {
		return path, nil
	}
	z, err := zip.OpenReader(path)
	if err != nil {
		return "", fmt.Errorf("%s is a damaged or truncated zip file: %w", path, err)
	}
	defer z.Close()
	if len(z.File) != 1 {
		return "", fmt.Errorf("%s has %d files instead of one snapshot", path, len(z.File))
	}
	from, err := z.File[0].Open()
	if err != nil {
		return "", fmt.Errorf("%s is a damaged zip file: %w", path, err)
	}
	defer from.Close()
	out := filepath.Join(dir, "snapshot")
	to, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Close()); err != nil {
		return "", fmt.Errorf("unpack %s: %w", path, err)
	}
	return out, nil
}
