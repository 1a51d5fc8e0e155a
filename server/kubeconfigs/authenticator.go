package kubeconfigs

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"net/http"
	"slices"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
)

// Authenticator authenticates requests with the certificates of kubeconfigs, which the API server's own authenticator refuses.
// It does not know the revoked ones, which do not get that far: see [Kubeconfigs.Follow].
func (k *Kubeconfigs) Authenticator() authenticator.Request {
	roots := x509.NewCertPool()
	roots.AddCert(k.authority.Cert)
	return authenticator.RequestFunc(func(r *http.Request) (*authenticator.Response, bool, error) {
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
			return nil, false, nil
		}
		c := r.TLS.PeerCertificates[0]
		if _, ours := k.Holder(c); !ours {
			return nil, false, nil
		}
		if _, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: k.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			return nil, false, err
		}
		// As the API server does for its certificates: so its audit log says which one was used.
		id := sha256.Sum256(c.Raw)
		return &authenticator.Response{User: &user.DefaultInfo{
			Name:   c.Subject.CommonName,
			Groups: append(slices.Clone(c.Subject.Organization), user.AllAuthenticated),
			Extra:  map[string][]string{user.CredentialIDKey: {"X509SHA256=" + hex.EncodeToString(id[:])}},
		}}, true, nil
	})
}
