package snapshots

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"

	"kedge/internal/atomicfile"
	"kedge/server/snapshots/archive"
)

const (
	// secretName is the Secret of kube-system with the recovery key. Whoever can read it could read the keys of the cluster
	// from a server's files too.
	secretName                   = "kedge-recovery-key"
	secretType corev1.SecretType = "kedge.io/recovery-key"
	secretData                   = "key"
)

// Keys keeps the cluster's recovery key: one for all servers.
type Keys struct {
	secrets v1core.SecretInterface // of kube-system
	dir     string                 // of the server
	made    func(archive.Key)      // called when the cluster's first key was made

	mu sync.Mutex // held while the key is read or replaced
}

// NewKeys returns the keys of the server in dir. made is called when the cluster's first key was made here.
func NewKeys(secrets v1core.SecretInterface, dir string, made func(archive.Key)) *Keys {
	return &Keys{secrets: secrets, dir: dir, made: made}
}

// Current returns the key. It makes the cluster's first one, and writes the copy of this server.
func (k *Keys) Current(ctx context.Context) (archive.Key, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	key, err := k.read(ctx)
	if apierrors.IsNotFound(err) {
		if key, err = k.first(); err == nil {
			key, err = k.create(ctx, key)
		}
	}
	if err != nil {
		return archive.Key{}, fmt.Errorf("read the recovery key: %w", err)
	}
	return key, k.write(key)
}

// first returns the key for a cluster that has none: that of the file, if an administrator has removed the Secret.
func (k *Keys) first() (archive.Key, error) {
	switch key, err := archive.ReadKey(k.dir); {
	case err == nil:
		return key, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, archive.ErrNotKey):
		return archive.NewKey()
	default:
		return archive.Key{}, err
	}
}

// create stores the first key, or returns the one that another server has stored meanwhile.
func (k *Keys) create(ctx context.Context, key archive.Key) (archive.Key, error) {
	_, err := k.secrets.Create(ctx, secretOf(key), metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return k.read(ctx)
	}
	if err == nil {
		k.made(key)
	}
	return key, err
}

func secretOf(key archive.Key) *corev1.Secret {
	return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secretName}, Type: secretType, Data: map[string][]byte{secretData: []byte(key.Reveal())}}
}

func (k *Keys) read(ctx context.Context) (archive.Key, error) {
	s, err := k.secrets.Get(ctx, secretName, metav1.GetOptions{})
	if err != nil {
		return archive.Key{}, err
	}
	key, err := archive.ParseKey(string(s.Data[secretData]))
	if err != nil || s.Type != secretType {
		return archive.Key{}, fmt.Errorf("the Secret %s of kube-system has no valid key; \"kedge recovery-key new\" replaces it", secretName)
	}
	return key, nil
}

// New replaces the key. Snapshots of before are opened by the earlier one, which the caller gets for a last time.
func (k *Keys) New(ctx context.Context) (earlier, key archive.Key, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if key, err = archive.NewKey(); err != nil {
		return archive.Key{}, archive.Key{}, err
	}
	if earlier, err = k.read(ctx); err != nil { // there is none, or none that can be read
		earlier = archive.Key{}
	}
	if err = k.secrets.Delete(ctx, secretName, metav1.DeleteOptions{}); err == nil || apierrors.IsNotFound(err) {
		_, err = k.secrets.Create(ctx, secretOf(key), metav1.CreateOptions{}) // the type of a Secret cannot be changed
	}
	if err != nil {
		return archive.Key{}, archive.Key{}, fmt.Errorf("store the new recovery key: %w", err)
	}
	return earlier, key, k.write(key)
}

func (k *Keys) write(key archive.Key) error {
	_, err := atomicfile.WriteIfChanged(filepath.Join(k.dir, archive.KeyFile), []byte(key.Reveal()+"\n"), 0o600)
	return err
}
