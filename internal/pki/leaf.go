package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kedge/internal/atomicfile"
)

// LeafLife is how long a leaf certificate is valid after it was signed.
const LeafLife = 365 * 24 * time.Hour

// Leaf describes a certificate to be signed.
type Leaf struct {
	CommonName    string
	Organizations []string
	DNSNames      []string // for a serving certificate
	IPs           []net.IP // for a serving certificate
	Client        bool     // may be used to authenticate as a client
	Server        bool     // may be used to serve
	// Purposes are extended key usages of kedge's own. Who verifies certificates for a usual one refuses a certificate
	// that has only these.
	Purposes []asn1.ObjectIdentifier
}

// Pair is the files of a certificate and its key.
type Pair struct {
	CertFile string // the leaf, then its authority, in PEM
	KeyFile  string
	Renewed  bool // the certificate was signed by this call
}

// EnsureLeaf makes sure that <dir>/<name>.crt and .key are a certificate of this authority for
// want and its key. It signs a new certificate when there is none, when it differs from want,
// or when less than a third of its life is left. The key is made once and kept; an unreadable
// key is replaced.
func (a *Authority) EnsureLeaf(dir, name string, want Leaf, now time.Time) (Pair, error) {
	p := Pair{CertFile: filepath.Join(dir, name+".crt"), KeyFile: filepath.Join(dir, name+".key")}
	key, err := EnsureKey(p.KeyFile)
	if errors.Is(err, ErrDamaged) {
		key, err = writeKey(p.KeyFile)
	}
	if err != nil {
		return p, err
	}
	if chain, err := os.ReadFile(p.CertFile); err == nil && a.isChain(chain) {
		if old, err := parseCert(p.CertFile, chain); err == nil && a.stillGood(old, key, want, now) {
			return p, nil
		}
	}
	// Missing, damaged and outdated certificates all have the same remedy.
	p.Renewed = true
	return p, a.signFile(p.CertFile, &key.PublicKey, want, now)
}

// Renew signs the certificate in certFile again, whatever is left of its life. With newKey it makes a new key in keyFile for
// it; otherwise there must be one. A crash between the two leaves a pair that [Authority.EnsureLeaf] repairs.
func (a *Authority) Renew(certFile, keyFile string, newKey bool, want Leaf, now time.Time) error {
	ofFile := LoadKey
	if newKey {
		ofFile = writeKey
	}
	key, err := ofFile(keyFile)
	if err != nil {
		return err
	}
	return a.signFile(certFile, &key.PublicKey, want, now)
}

// signFile signs the certificate in a file.
func (a *Authority) signFile(path string, key *ecdsa.PublicKey, want Leaf, now time.Time) error {
	chain, err := a.Sign(key, want, LeafLife, now)
	if err != nil {
		return fmt.Errorf("sign %s: %w", path, err)
	}
	return atomicfile.Write(path, chain, 0o644)
}

// LeafOf describes a certificate as it would be signed again.
func LeafOf(c *x509.Certificate) Leaf {
	return Leaf{
		CommonName: c.Subject.CommonName, Organizations: c.Subject.Organization, DNSNames: c.DNSNames, IPs: c.IPAddresses,
		Client: slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth), Server: slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth),
		Purposes: c.UnknownExtKeyUsage,
	}
}

// Sign makes a certificate for another machine's key, valid for life but not longer than the
// authority itself. It returns the leaf and then the authority in PEM.
func (a *Authority) Sign(key *ecdsa.PublicKey, want Leaf, life time.Duration, now time.Time) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	end := now.Add(life).UTC().Truncate(time.Second)
	if end.After(a.Cert.NotAfter) {
		end = a.Cert.NotAfter
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: want.CommonName, Organization: want.Organizations},
		NotBefore:    validFrom,
		NotAfter:     end,
		KeyUsage:     x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		ExtKeyUsage:  want.usages(),

		UnknownExtKeyUsage: want.Purposes,
		DNSNames:           want.DNSNames,
		IPAddresses:        want.IPs,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, a.Cert, key, a.key)
	if err != nil {
		return nil, err
	}
	return append(encodeCert(der), a.PEM()...), nil
}

func (l Leaf) usages() []x509.ExtKeyUsage {
	var u []x509.ExtKeyUsage
	if l.Client {
		u = append(u, x509.ExtKeyUsageClientAuth)
	}
	if l.Server {
		u = append(u, x509.ExtKeyUsageServerAuth)
	}
	return u
}

// isChain reports whether the file's content is a certificate and then this authority's, which its verifiers need.
func (a *Authority) isChain(data []byte) bool {
	first, rest := pem.Decode(data)
	return first != nil && bytes.Equal(bytes.TrimSpace(rest), bytes.TrimSpace(a.PEM()))
}

func (a *Authority) stillGood(c *x509.Certificate, key *ecdsa.PrivateKey, want Leaf, now time.Time) bool {
	pub, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(&key.PublicKey) || c.CheckSignatureFrom(a.Cert) != nil || !bytes.Equal(c.RawIssuer, a.Cert.RawSubject) {
		return false
	}
	left := c.NotAfter.Sub(now)
	// The second half catches a certificate signed while the clock was years ahead.
	if left < LeafLife/3 && c.NotAfter.Before(a.Cert.NotAfter) || left > 2*LeafLife {
		return false
	}
	return left > 0 &&
		c.Subject.CommonName == want.CommonName &&
		sameSet(c.Subject.Organization, want.Organizations) &&
		sameSet(c.DNSNames, want.DNSNames) &&
		sameSet(ipStrings(c.IPAddresses), ipStrings(want.IPs)) &&
		slices.Equal(c.ExtKeyUsage, want.usages()) &&
		slices.EqualFunc(c.UnknownExtKeyUsage, want.Purposes, asn1.ObjectIdentifier.Equal)
}

func sameSet(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

func ipStrings(ips []net.IP) []string {
	out := make([]string, 0, len(ips))
	for _, ip := range ips {
		out = append(out, ip.String())
	}
	return out
}
