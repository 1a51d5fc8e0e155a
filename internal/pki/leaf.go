package pki

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
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
}

// Pair is the files of a certificate and its key.
type Pair struct {
	CertFile string // the leaf, then its authority, in PEM
	KeyFile  string
	Renewed  bool // the certificate was signed by this call
}

// EnsureLeaf makes sure that <dir>/<name>.crt and .key are a certificate of
// this authority for want, and signs a new one when there is none, when it says
// something else than want, or when less than a third of its life is left. The
// key is made once and kept.
func (a *Authority) EnsureLeaf(dir, name string, want Leaf, now time.Time) (Pair, error) {
	p := Pair{CertFile: filepath.Join(dir, name+".crt"), KeyFile: filepath.Join(dir, name+".key")}
	key, err := EnsureKey(p.KeyFile)
	if err != nil {
		return p, err
	}
	old, err := readCert(p.CertFile)
	if err == nil && a.stillGood(old, key, want, now) {
		return p, nil
	}
	// Missing, damaged and outdated certificates all have the same remedy.
	chain, err := a.Sign(&key.PublicKey, want, LeafLife, now)
	if err != nil {
		return p, fmt.Errorf("sign %s: %w", p.CertFile, err)
	}
	p.Renewed = true
	return p, atomicfile.Write(p.CertFile, chain, 0o644)
}

// Sign makes a certificate for somebody else's key, valid for life but not longer
// than the authority itself. It returns the leaf and then the authority in PEM.
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
		DNSNames:     want.DNSNames,
		IPAddresses:  want.IPs,
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

func (a *Authority) stillGood(c *x509.Certificate, key *ecdsa.PrivateKey, want Leaf, now time.Time) bool {
	pub, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || !pub.Equal(&key.PublicKey) || c.CheckSignatureFrom(a.Cert) != nil {
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
		slices.Equal(c.ExtKeyUsage, want.usages())
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
