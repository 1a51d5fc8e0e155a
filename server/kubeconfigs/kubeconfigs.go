package kubeconfigs

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/util/retry"

	"kedge/internal/pki"
)

// ErrUnknown is wrapped if there is no kubeconfig of a user.
var ErrUnknown = errors.New("there is no kubeconfig of the user")

// purpose marks the certificates of kubeconfigs, in place of the usual one of clients. So they are worth something only where
// revoked ones are known: the kubelets, extension API servers and earlier versions of kedge, which trust the same authority,
// refuse them all. The number is derived from a random UUID.
var purpose = asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 13299, 41467, 13897, 18114, 35074, 8398664, 1111031}

// Kubeconfigs are the kubeconfigs of a cluster's users.
type Kubeconfigs struct {
	authority *pki.Authority
	secrets   v1core.SecretInterface // of kube-system
	now       func() time.Time
}

// New returns the kubeconfigs of a cluster. authority signs client certificates; client acts for the server itself.
func New(authority *pki.Authority, client kubernetes.Interface) *Kubeconfigs {
	return &Kubeconfigs{authority: authority, secrets: client.CoreV1().Secrets(metav1.NamespaceSystem), now: time.Now}
}

// Listed is a kubeconfig as "kedge kubeconfig ls" shows it.
type Listed struct {
	ID      string    `json:"id"`
	User    string    `json:"user"`
	Groups  []string  `json:"groups"`
	Created time.Time `json:"created"`
	Ends    time.Time `json:"ends"`
	Revoked time.Time `json:"revoked,omitzero"` // zero: it was not revoked
}

const (
	secretType   corev1.SecretType = "kedge.io/kubeconfig"
	secretPrefix                   = "kedge-kubeconfig-"
	// keepEnded is how long a kubeconfig that has ended is listed.
	keepEnded = 30 * 24 * time.Hour
	// idLength is how many characters of a key's fingerprint are the ID of its kubeconfig.
	idLength = 12
)

// Keys of a kubeconfig's Secret.
const (
	keyFingerprint = "key"     // pki.Fingerprint of the user's key
	keyUser        = "user"    //
	keyGroups      = "groups"  // as JSON
	keyCreated     = "created" // RFC 3339, as the others
	keyEnds        = "ends"
	keyRevoked     = "revoked" // missing: it was not revoked
)

// Create signs a certificate for the key of a request (see [pki.Request]), and records it. It returns the certificate and its
// authority in PEM. It forgets the kubeconfigs that ended long ago.
func (k *Kubeconfigs) Create(ctx context.Context, s Spec, request []byte) (chain []byte, made Listed, err error) {
	if err := s.Validate(); err != nil {
		return nil, made, err
	}
	key, err := pki.ParseRequest(request)
	if err != nil {
		return nil, made, err
	}
	fingerprint, err := pki.Fingerprint(key)
	if err != nil {
		return nil, made, err
	}
	if err := k.sweep(ctx); err != nil {
		return nil, made, err
	}
	now := k.now()
	chain, err = k.authority.Sign(key, pki.Leaf{CommonName: s.User, Organizations: s.Groups, Purposes: []asn1.ObjectIdentifier{purpose}}, s.TTL, now)
	if err != nil {
		return nil, made, fmt.Errorf("sign the certificate of %s: %w", s.User, err)
	}
	cert, err := pki.ParseCertificate(s.User, chain)
	if err != nil {
		return nil, made, err
	}
	made = Listed{ID: fingerprint[:idLength], User: s.User, Groups: s.Groups, Created: now.UTC().Truncate(time.Second), Ends: cert.NotAfter}
	groups, err := json.Marshal(s.Groups)
	if err != nil {
		return nil, made, err
	}
	_, err = k.secrets.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: secretPrefix + made.ID}, Type: secretType,
		Data: map[string][]byte{
			keyFingerprint: []byte(fingerprint), keyUser: []byte(s.User), keyGroups: groups,
			keyCreated: []byte(made.Created.Format(time.RFC3339)), keyEnds: []byte(made.Ends.Format(time.RFC3339)),
		},
	}, metav1.CreateOptions{})
	if err != nil { // without its record the certificate is refused
		return nil, made, fmt.Errorf("record the kubeconfig: %w", err)
	}
	return chain, made, nil
}

// sweep forgets kubeconfigs that ended long ago. Damaged records stay; [Kubeconfigs.List] reports them.
func (k *Kubeconfigs) sweep(ctx context.Context) error {
	all, _, err := k.list(ctx)
	if err != nil {
		return err
	}
	for _, l := range all {
		if k.now().Sub(l.Ends) < keepEnded {
			continue
		}
		if err := k.secrets.Delete(ctx, secretPrefix+l.ID, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("forget the kubeconfig %s, which has ended: %w", l.ID, err)
		}
	}
	return nil
}

// List returns all kubeconfigs, by user and then by their beginning.
func (k *Kubeconfigs) List(ctx context.Context) ([]Listed, error) {
	all, damaged, err := k.list(ctx)
	if err := errors.Join(err, damaged); err != nil {
		return nil, err
	}
	return all, nil
}

// list returns the kubeconfigs whose records can be read, and what is wrong with the others.
func (k *Kubeconfigs) list(ctx context.Context) (all []Listed, damaged, err error) {
	found, err := k.secrets.List(ctx, metav1.ListOptions{FieldSelector: ofKubeconfigs})
	if err != nil {
		return nil, nil, fmt.Errorf("list kubeconfigs: %w", err)
	}
	all = []Listed{}
	var bad []error
	for _, s := range found.Items {
		if s.Type != secretType {
			continue
		}
		l, err := read(&s)
		if err != nil {
			bad = append(bad, err)
			continue
		}
		all = append(all, l)
	}
	slices.SortFunc(all, func(a, b Listed) int {
		return cmp.Or(strings.Compare(a.User, b.User), a.Created.Compare(b.Created), strings.Compare(a.ID, b.ID))
	})
	return all, errors.Join(bad...), nil
}

func read(s *corev1.Secret) (Listed, error) {
	l := Listed{ID: strings.TrimPrefix(s.Name, secretPrefix), User: string(s.Data[keyUser])}
	err := json.Unmarshal(s.Data[keyGroups], &l.Groups)
	for _, at := range []struct {
		key  string
		into *time.Time
	}{{keyCreated, &l.Created}, {keyEnds, &l.Ends}, {keyRevoked, &l.Revoked}} {
		if _, there := s.Data[at.key]; at.key == keyRevoked && !there || err != nil {
			continue
		}
		*at.into, err = time.Parse(time.RFC3339, string(s.Data[at.key]))
	}
	if err != nil {
		return l, fmt.Errorf("the record of a kubeconfig is damaged: the Secret %s of kube-system: %w; the kubeconfig is refused, so remove the Secret", s.Name, err)
	}
	return l, nil
}

// Revoke makes all kubeconfigs of a user worthless, or only the one with the ID, if it is not empty. It returns those that it
// has revoked; some may be revoked if there is an error.
func (k *Kubeconfigs) Revoke(ctx context.Context, user, id string) (revoked []Listed, err error) {
	all, _, err := k.list(ctx)
	if err != nil {
		return nil, err
	}
	known := false
	for _, l := range all {
		if l.User != user || id != "" && l.ID != id {
			continue
		}
		known = true
		if !l.Revoked.IsZero() {
			continue
		}
		if l.Revoked, err = k.revoke(ctx, secretPrefix+l.ID); err != nil {
			return revoked, fmt.Errorf("revoke the kubeconfig %s: %w", l.ID, err)
		}
		revoked = append(revoked, l)
	}
	switch {
	case !known && id != "":
		return nil, fmt.Errorf("%w %q with the ID %q; \"kedge kubeconfig ls\" shows them", ErrUnknown, user, id)
	case !known:
		return nil, fmt.Errorf("%w %q; \"kedge kubeconfig ls\" shows them", ErrUnknown, user)
	}
	return revoked, nil
}

// revoke marks one record, and returns since when it is revoked.
func (k *Kubeconfigs) revoke(ctx context.Context, name string) (since time.Time, err error) {
	since = k.now().UTC().Truncate(time.Second)
	err = retry.RetryOnConflict(retry.DefaultRetry, func() error {
		s, err := k.secrets.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil // forgotten meanwhile, and as worthless
		}
		if err != nil {
			return err
		}
		s = s.DeepCopy()
		s.Data[keyRevoked] = []byte(since.Format(time.RFC3339))
		_, err = k.secrets.Update(ctx, s, metav1.UpdateOptions{})
		return err
	})
	return since, err
}

var ofKubeconfigs = fields.OneTermEqualSelector("type", string(secretType)).String()

// Holder returns the fingerprint of the key in a kubeconfig's certificate, and false for all other certificates. Who has
// signed it is not looked at. The fingerprint is empty if no kubeconfig has such a key.
func (k *Kubeconfigs) Holder(c *x509.Certificate) (fingerprint string, ok bool) {
	if !slices.ContainsFunc(c.UnknownExtKeyUsage, purpose.Equal) {
		return "", false
	}
	fingerprint, err := pki.FingerprintOf(c)
	if err != nil {
		return "", true
	}
	return fingerprint, true
}

// Follow calls tell with the fingerprints of the keys of all kubeconfigs that are not revoked, each as its own value, and
// again whenever they change, until ctx ends or the watch does.
func (k *Kubeconfigs) Follow(ctx context.Context, tell func(map[string]string)) error {
	list, err := k.secrets.List(ctx, metav1.ListOptions{FieldSelector: ofKubeconfigs})
	if err != nil {
		return err
	}
	byName := map[string]string{}
	for _, s := range list.Items {
		note(byName, &s, false)
	}
	tell(inverse(byName))
	w, err := k.secrets.Watch(ctx, metav1.ListOptions{FieldSelector: ofKubeconfigs, ResourceVersion: list.ResourceVersion})
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
		note(byName, s, e.Type == watch.Deleted)
		tell(inverse(byName))
	}
	return nil
}

// note notes in valid whether the kubeconfig of a record is valid, which a damaged one is not.
func note(valid map[string]string, s *corev1.Secret, deleted bool) {
	if s.Type != secretType {
		return
	}
	l, err := read(s)
	if deleted || err != nil || !l.Revoked.IsZero() || len(s.Data[keyFingerprint]) == 0 {
		delete(valid, s.Name)
		return
	}
	valid[s.Name] = string(s.Data[keyFingerprint])
}

func inverse(byName map[string]string) map[string]string {
	out := make(map[string]string, len(byName))
	for f := range maps.Values(byName) {
		out[f] = f
	}
	return out
}
