package server

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"gopkg.in/go-jose/go-jose.v2/jwt"
	"k8s.io/client-go/util/keyutil"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/pkg/serviceaccount"

	"kedge/internal/errorkind"
	"kedge/internal/pki"
	"kedge/server/arguments"
)

// AccountKeys are the keys of service accounts' tokens, as the API server and the controllers of this process use them. Upstream
// reads its files once; here the keys can be replaced at any time. It implements accountkeys.API.
type AccountKeys struct {
	mu        sync.Mutex // guards the fields below
	keys      []pki.SigningKey
	more      []any                                    // public keys of the user's files
	known     serviceaccount.PublicKeysGetter          // all of them
	signers   map[string]serviceaccount.TokenGenerator // with the first key, by issuer
	listeners []serviceaccount.Listener
	used      map[string]time.Time
}

// NewAccountKeys returns the keys, of which there are none yet.
func NewAccountKeys() *AccountKeys { return &AccountKeys{used: map[string]time.Time{}} }

// Use implements accountkeys.API.
func (k *AccountKeys) Use(keys []pki.SigningKey) error {
	k.mu.Lock()
	err := k.use(keys, k.more)
	listeners := k.listeners
	k.mu.Unlock()
	if err != nil {
		return err
	}
	for _, l := range listeners {
		l.Enqueue() // publishes the keys, which it reads meanwhile
	}
	return nil
}

// use is [AccountKeys.Use] without telling anybody. The caller holds mu.
func (k *AccountKeys) use(keys []pki.SigningKey, more []any) error {
	var all []any
	for _, key := range keys {
		all = append(all, key.Public())
	}
	known, err := serviceaccount.StaticPublicKeysGetter(append(all, more...))
	if err != nil {
		return err
	}
	k.keys, k.more, k.known, k.signers = keys, more, known, map[string]serviceaccount.TokenGenerator{}
	return nil
}

// LastUse implements accountkeys.API.
func (k *AccountKeys) LastUse(id string) time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.used[id]
}

// AddListener implements serviceaccount.PublicKeysGetter.
func (k *AccountKeys) AddListener(l serviceaccount.Listener) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.listeners = append(k.listeners, l)
}

// GetCacheAgeMaxSeconds implements serviceaccount.PublicKeysGetter: as upstream's for keys in files.
func (k *AccountKeys) GetCacheAgeMaxSeconds() int { return 3600 }

// GetPublicKeys implements serviceaccount.PublicKeysGetter.
func (k *AccountKeys) GetPublicKeys(ctx context.Context, id string) []serviceaccount.PublicKey {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known == nil {
		return nil
	}
	found := k.known.GetPublicKeys(ctx, id)
	if id != "" && len(found) > 0 {
		k.used[id] = time.Now()
	}
	return found
}

// generator returns upstream's generator of an issuer's tokens, with the key that signs at the time.
func (k *AccountKeys) generator(issuer string) serviceaccount.TokenGenerator {
	return generator{k, issuer}
}

type generator struct {
	keys   *AccountKeys
	issuer string
}

// GenerateToken implements serviceaccount.TokenGenerator.
func (g generator) GenerateToken(ctx context.Context, claims *jwt.Claims, private any) (string, error) {
	signer, err := g.keys.signer(g.issuer)
	if err != nil {
		return "", err
	}
	return signer.GenerateToken(ctx, claims, private)
}

func (k *AccountKeys) signer(issuer string) (serviceaccount.TokenGenerator, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.keys) == 0 {
		return nil, errors.New("the key of service accounts' tokens is not known yet")
	}
	if s, ok := k.signers[issuer]; ok {
		return s, nil
	}
	s, err := serviceaccount.JWTTokenGenerator(issuer, k.keys[0].Signer)
	if err != nil {
		return nil, fmt.Errorf("sign tokens of service accounts: %w", err)
	}
	k.signers[issuer] = s
	return s, nil
}

// signsElsewhere reports whether the user has given another signer of service accounts' tokens.
func (s *APIServer) signsElsewhere() bool { return s.opts.ServiceAccountSigningEndpoint != "" }

// attachAccountKeys replaces the keys that the API server has read from files by those that can change.
func (s *APIServer) attachAccountKeys(completed options.CompletedOptions) error {
	if s.signsElsewhere() {
		return nil
	}
	accounts := completed.Authentication.ServiceAccounts
	if completed.ServiceAccountIssuer == nil || accounts.ExternalPublicKeysGetter != nil || len(accounts.Issuers) == 0 {
		return errors.New("configure the API server: upstream's use of the keys of service accounts' tokens has changed")
	}
	var more []any
	for _, file := range accounts.KeyFiles {
		if file == s.deps.Identity.ServiceAccountKey {
			continue
		}
		keys, err := keyutil.PublicKeysFromFile(file)
		if err != nil {
			return errorkind.BadSetting(arguments.FromAPIServer, ": service-account-key-file: %w", err)
		}
		more = append(more, keys...)
	}
	k := s.deps.AccountKeys
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.use(k.keys, more); err != nil {
		return err
	}
	accounts.KeyFiles, accounts.ExternalPublicKeysGetter = nil, k
	completed.ServiceAccountIssuer = k.generator(accounts.Issuers[0])
	return nil
}
