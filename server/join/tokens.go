package join

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/util/retry"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
)

// Errors of tokens that do not admit a machine. Each is one sentence for the administrator.
var (
	ErrUnknownToken = errors.New("the cluster does not know this token: it is mistyped or was removed; make another with \"kedge token create\" on a server")
	ErrExpired      = errors.New("the token has expired; make another with \"kedge token create\" on a server")
	ErrUsedUp       = errors.New("the token has been used as often as it may be; make another with \"kedge token create\" on a server")
	ErrRole         = errors.New("the token is for another role")
	ErrName         = errors.New("the token is for a node of another name")
)

// Limits of tokens.
const (
	DefaultTTL = 15 * time.Minute
	MaxTTL     = 365 * 24 * time.Hour
	maxUses    = 10000
)

// Spec is what a token allows.
type Spec struct {
	Role     joining.Role
	TTL      time.Duration
	Uses     int    // how many machines may join with it
	NodeName string // the only name that may join with it; empty: any
}

// Validate reports everything that is wrong with s, joined.
func (s Spec) Validate() error {
	var errs []error
	if !slices.Contains(joining.Roles, s.Role) {
		errs = append(errs, errorkind.BadSetting("role", " %q is none of agent, server and witness", s.Role))
	}
	if s.TTL < time.Second || s.TTL > MaxTTL {
		errs = append(errs, errorkind.BadSetting("ttl", " %s is not between 1s and %s", s.TTL, MaxTTL))
	}
	if s.Uses < 1 || s.Uses > maxUses {
		errs = append(errs, errorkind.BadSetting("uses", " %d is not between 1 and %d", s.Uses, maxUses))
	}
	if s.NodeName != "" {
		errs = append(errs, validName(s.NodeName))
	}
	return errors.Join(errs...)
}

// Listed is a token as "kedge token ls" shows it. Its secret nobody knows.
type Listed struct {
	ID       string       `json:"id"`
	Role     joining.Role `json:"role"`
	Expires  time.Time    `json:"expires"`
	UsesLeft int          `json:"usesLeft"`
	NodeName string       `json:"nodeName,omitempty"`
}

// Tokens are the cluster's tokens.
type Tokens struct {
	secrets v1core.SecretInterface // of kube-system
	now     func() time.Time
}

const (
	tokenType   corev1.SecretType = "kedge.io/token"
	tokenPrefix                   = "kedge-token-"
	// keepExpired is how long a token that has expired can be recognised as such.
	keepExpired = 24 * time.Hour
)

// Keys of a token's Secret.
const (
	keyHash    = "hash"
	keyRole    = "role"
	keyExpires = "expires"
	keyUses    = "usesLeft"
	keyName    = "nodeName"
)

// Create makes a token that names the authority with caHash, and forgets those
// that expired long ago.
func (t *Tokens) Create(ctx context.Context, caHash string, s Spec) (joining.Token, error) {
	if err := s.Validate(); err != nil {
		return joining.Token{}, err
	}
	// Before there is anything that could be of use to somebody who is told of an error.
	if err := t.sweep(ctx); err != nil {
		return joining.Token{}, err
	}
	made := joining.NewToken(caHash)
	_, err := t.secrets.Create(ctx, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: tokenPrefix + made.ID},
		Type:       tokenType,
		Data: map[string][]byte{
			keyHash: []byte(made.Secret.Hash()), keyRole: []byte(s.Role), keyName: []byte(s.NodeName),
			keyExpires: []byte(t.now().Add(s.TTL).UTC().Format(time.RFC3339)), keyUses: []byte(strconv.Itoa(s.Uses)),
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return joining.Token{}, fmt.Errorf("store the token: %w", err)
	}
	return made, nil
}

// sweep removes tokens that expired long ago. Damaged ones stay; [Tokens.List] tells of them.
func (t *Tokens) sweep(ctx context.Context) error {
	all, _, err := t.list(ctx)
	if err != nil {
		return err
	}
	for _, old := range all {
		if t.now().Sub(old.Expires) < keepExpired {
			continue
		}
		if err := t.Remove(ctx, old.ID); err != nil && !errors.Is(err, ErrUnknownToken) {
			return err
		}
	}
	return nil
}

// List returns all tokens, those that expire first first.
func (t *Tokens) List(ctx context.Context) ([]Listed, error) {
	all, damaged, err := t.list(ctx)
	if err == nil {
		err = damaged
	}
	if err != nil {
		return nil, err
	}
	return all, nil
}

// list returns the tokens that can be read, and what is wrong with the others.
func (t *Tokens) list(ctx context.Context) (all []Listed, damaged, err error) {
	found, err := t.secrets.List(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("type", string(tokenType)).String()})
	if err != nil {
		return nil, nil, fmt.Errorf("list tokens: %w", err)
	}
	out := []Listed{}
	var bad []error
	for _, s := range found.Items {
		if s.Type != tokenType {
			continue
		}
		l, err := read(&s)
		if err != nil {
			bad = append(bad, err)
			continue
		}
		out = append(out, l)
	}
	slices.SortFunc(out, func(a, b Listed) int {
		if c := a.Expires.Compare(b.Expires); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out, errors.Join(bad...), nil
}

// Remove makes a token worthless.
func (t *Tokens) Remove(ctx context.Context, id string) error {
	if !joining.ValidTokenID(id) {
		return fmt.Errorf("%q is no token's name; \"kedge token ls\" shows them", id)
	}
	err := t.secrets.Delete(ctx, tokenPrefix+id, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return ErrUnknownToken
	}
	return err
}

func read(s *corev1.Secret) (Listed, error) {
	l := Listed{ID: strings.TrimPrefix(s.Name, tokenPrefix), Role: joining.Role(s.Data[keyRole]), NodeName: string(s.Data[keyName])}
	var err error
	if l.Expires, err = time.Parse(time.RFC3339, string(s.Data[keyExpires])); err == nil {
		l.UsesLeft, err = strconv.Atoi(string(s.Data[keyUses]))
	}
	if err != nil {
		return l, fmt.Errorf("token %s is damaged: %w; remove it with \"kedge token rm %s\"", l.ID, err, l.ID)
	}
	return l, nil
}

// check returns nil if the token allows this node to join, and spends nothing.
// Whoever does not know the secret learns only that.
func (t *Tokens) check(ctx context.Context, id string, secret joining.Secret, role joining.Role, nodeName string) error {
	_, err := t.lookup(ctx, id, secret, role, nodeName)
	return err
}

func (t *Tokens) lookup(ctx context.Context, id string, secret joining.Secret, role joining.Role, nodeName string) (*corev1.Secret, error) {
	if !joining.ValidTokenID(id) || id == joining.PresharedID {
		return nil, ErrUnknownToken
	}
	s, err := t.secrets.Get(ctx, tokenPrefix+id, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, ErrUnknownToken
	}
	if err != nil {
		return nil, fmt.Errorf("read the token: %w", err)
	}
	if s.Type != tokenType || !secret.Matches(string(s.Data[keyHash])) {
		return nil, ErrUnknownToken
	}
	l, err := read(s)
	switch {
	case err != nil:
		return nil, err
	case !t.now().Before(l.Expires):
		return nil, ErrExpired
	case !l.Role.Admits(role):
		return nil, fmt.Errorf("%w: it lets in machines with %q", ErrRole, l.Role.Command())
	case l.NodeName != "" && l.NodeName != nodeName:
		return nil, fmt.Errorf("%w: %q; start this one with --node-name, or make another token", ErrName, l.NodeName)
	}
	return s, nil
}

// spend checks the token again and takes one use of it. Two machines never get the
// same use: the write fails if the token has changed since it was read.
func (t *Tokens) spend(ctx context.Context, id string, secret joining.Secret, role joining.Role, nodeName string) error {
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		s, err := t.lookup(ctx, id, secret, role, nodeName)
		if err != nil {
			return err
		}
		left, err := strconv.Atoi(string(s.Data[keyUses]))
		if err != nil {
			return err
		}
		if left < 1 {
			return ErrUsedUp
		}
		s = s.DeepCopy()
		s.Data[keyUses] = []byte(strconv.Itoa(left - 1))
		_, err = t.secrets.Update(ctx, s, metav1.UpdateOptions{})
		return err
	})
}
