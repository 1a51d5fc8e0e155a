package join

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"kedge/internal/joining"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/watch"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/util/retry"
)

// Errors of keys that are not admitted as a node's.
var (
	ErrNameTaken   = errors.New("another machine has this node's name")
	ErrUnknownNode = errors.New("the cluster does not know this node")
	ErrBadName     = errors.New("that can be no node's name")
)

// Nodes is which key each node has. A name belongs to the first key that joined
// with it, until an operator allows another.
type Nodes struct {
	secrets v1core.SecretInterface // of kube-system
	now     func() time.Time
}

const (
	nodeType   corev1.SecretType = "kedge.io/node"
	nodePrefix                   = "kedge-node-"
)

// Keys of a node's Secret.
const (
	keyFingerprint = "key"     // pki.Fingerprint of the node's key
	keyJoined      = "joined"  // when it came, RFC 3339
	keyAllowed     = "allowed" // "true": the next key may take the name
	// keyRole is the [joining.Role] of the node's key: a machine that was admitted with a token for agents is no server,
	// whatever it requests later.
)

// maxName is how many characters a node's name has at most: it is a label's value.
const maxName = 63

func validName(name string) error {
	if len(name) > maxName || len(validation.IsDNS1123Subdomain(name)) > 0 {
		return fmt.Errorf("%w: %.80q; want at most %d small letters, digits, dots and dashes, with a letter or digit at both ends", ErrBadName, name, maxName)
	}
	return nil
}

// admitted reports whether the node was admitted with this key in this role. If it was admitted with another key, which an
// administrator has not allowed to be replaced, the error is ErrNameTaken. A server is an agent too, and a witness is none.
func (n *Nodes) admitted(ctx context.Context, name, fingerprint string, role joining.Role) (bool, error) {
	s, err := n.get(ctx, name)
	switch {
	case errors.Is(err, ErrUnknownNode):
		return false, nil
	case err != nil:
		return false, err
	case string(s.Data[keyFingerprint]) == fingerprint:
		had := joining.Role(s.Data[keyRole])
		return had == role || role == joining.Agent && had != joining.Witness, nil
	case string(s.Data[keyAllowed]) == "true":
		return false, nil
	}
	return false, fmt.Errorf("%w, %q: if this one replaces it, run \"kedge node allow %s\" on a server and try again; otherwise choose another name with --node-name", ErrNameTaken, name, name)
}

func (n *Nodes) get(ctx context.Context, name string) (*corev1.Secret, error) {
	if err := validName(name); err != nil {
		return nil, err
	}
	s, err := n.secrets.Get(ctx, nodePrefix+name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("%w: %q", ErrUnknownNode, name)
	case err != nil:
		return nil, fmt.Errorf("read the key of node %s: %w", name, err)
	case s.Type != nodeType:
		return nil, fmt.Errorf("the Secret %s of kube-system is not kedge's; remove it", s.Name)
	}
	return s, nil
}

// admit gives the name to the key in a role. Of two keys that are admitted at once the second
// gets ErrNameTaken.
func (n *Nodes) admit(ctx context.Context, name, fingerprint string, role joining.Role) error {
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		known, err := n.admitted(ctx, name, fingerprint, role)
		if err != nil || known {
			return err
		}
		return n.put(ctx, name, fingerprint, role)
	})
}

// Set gives the name to the key as a server's, whoever had it: for a server's own node.
func (n *Nodes) Set(ctx context.Context, name, fingerprint string) error {
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		s, err := n.get(ctx, name)
		if err == nil && string(s.Data[keyFingerprint]) == fingerprint && joining.Role(s.Data[keyRole]) == joining.Server || err != nil && !errors.Is(err, ErrUnknownNode) {
			return err
		}
		return n.put(ctx, name, fingerprint, joining.Server)
	})
}

// Joined reports whether a node with the name has joined.
func (n *Nodes) Joined(ctx context.Context, name string) (bool, error) {
	_, err := n.get(ctx, name)
	if errors.Is(err, ErrUnknownNode) {
		return false, nil
	}
	return err == nil, err
}

// Forget frees the name: the node is gone for good, and its key is worth nothing.
func (n *Nodes) Forget(ctx context.Context, name string) error {
	if _, err := n.get(ctx, name); err != nil {
		if errors.Is(err, ErrUnknownNode) {
			return nil
		}
		return err
	}
	if err := n.secrets.Delete(ctx, nodePrefix+name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("forget the key of node %s: %w", name, err)
	}
	return nil
}

// put writes the node's key. The error is a conflict if the node has changed
// meanwhile.
func (n *Nodes) put(ctx context.Context, name, fingerprint string, role joining.Role) error {
	data := map[string][]byte{
		keyFingerprint: []byte(fingerprint), keyJoined: []byte(n.now().UTC().Format(time.RFC3339)), keyRole: []byte(role),
	}
	s, err := n.get(ctx, name)
	switch {
	case errors.Is(err, ErrUnknownNode):
		_, err = n.secrets.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: nodePrefix + name}, Type: nodeType, Data: data}, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return apierrors.NewConflict(corev1.Resource("secrets"), nodePrefix+name, err)
		}
	case err == nil:
		s = s.DeepCopy()
		s.Data = data
		_, err = n.secrets.Update(ctx, s, metav1.UpdateOptions{})
	}
	return err
}

// Follow tells the fingerprints of all nodes' keys, by name, and tells them again
// whenever they change, until ctx ends or the watch does.
func (n *Nodes) Follow(ctx context.Context, tell func(map[string]string)) error {
	ofNodes := fields.OneTermEqualSelector("type", string(nodeType)).String()
	list, err := n.secrets.List(ctx, metav1.ListOptions{FieldSelector: ofNodes})
	if err != nil {
		return err
	}
	keys := map[string]string{}
	for _, s := range list.Items {
		if s.Type != nodeType {
			continue
		}
		keys[strings.TrimPrefix(s.Name, nodePrefix)] = string(s.Data[keyFingerprint])
	}
	tell(maps.Clone(keys))
	w, err := n.secrets.Watch(ctx, metav1.ListOptions{FieldSelector: ofNodes, ResourceVersion: list.ResourceVersion})
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, w.Stop)
	defer stop()
	defer w.Stop()
	for e := range w.ResultChan() {
		s, ok := e.Object.(*corev1.Secret)
		if !ok {
			return errors.New("the API ended the watch")
		}
		if s.Type != nodeType {
			continue
		}
		name := strings.TrimPrefix(s.Name, nodePrefix)
		keys[name] = string(s.Data[keyFingerprint])
		if e.Type == watch.Deleted {
			delete(keys, name)
		}
		tell(maps.Clone(keys))
	}
	return nil
}

// Allow lets the next key that joins with a token take the name.
func (n *Nodes) Allow(ctx context.Context, name string) error {
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		s, err := n.get(ctx, name)
		if err != nil {
			return err
		}
		s = s.DeepCopy()
		s.Data[keyAllowed] = []byte("true")
		_, err = n.secrets.Update(ctx, s, metav1.UpdateOptions{})
		return err
	})
}
