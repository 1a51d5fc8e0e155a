package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"kedge/internal/atomicfile"
)

// AuthorityLife is how long an authority's certificate is valid.
const AuthorityLife = 10 * 365 * 24 * time.Hour

// validFrom is the beginning of every certificate's validity. It is a fixed
// moment before kedge existed, not the time of signing: a device without a
// battery-backed clock, or another machine whose clock is behind, must not
// reject a certificate for being too new.
var validFrom = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// ErrExpired is wrapped when an authority's certificate has expired: leaves can
// no longer be renewed under it.
var ErrExpired = errors.New("the certificate authority has expired")

// ErrMismatch is wrapped when a certificate and its key do not belong together.
var ErrMismatch = errors.New("certificate and key do not belong together")

// Authority is a certificate authority with its private key.
type Authority struct {
	Cert *x509.Certificate
	key  crypto.Signer
	path string // without extension
}

// EnsureAuthority loads the authority in <dir>/<name>.crt and .key, or makes
// it. The directory must exist. An existing certificate is never replaced, and
// no key is made for one.
func EnsureAuthority(dir, name string, now time.Time) (*Authority, error) {
	a, err := LoadAuthority(dir, name, now)
	if !errors.Is(err, fs.ErrNotExist) {
		return a, err
	}
	base := filepath.Join(dir, name)
	if _, err := os.Stat(base + ".crt"); err == nil {
		return nil, fmt.Errorf("%s.key is missing, and %s.crt is there; restore both files from a backup", base, base)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	// First boot, or a crash between key and certificate. Nothing can have
	// been signed yet, since this function had not returned.
	key, err := EnsureKey(base + ".key")
	if err != nil {
		return nil, err
	}
	if _, err = selfSign(base+".crt", name, key, now); err != nil {
		return nil, err
	}
	return LoadAuthority(dir, name, now)
}

// LoadAuthority loads the authority in <dir>/<name>.crt and .key, and writes
// nothing. Where a file is missing the error is fs.ErrNotExist. The files may be
// an administrator's own.
func LoadAuthority(dir, name string, now time.Time) (*Authority, error) {
	base := filepath.Join(dir, name)
	key, err := loadSigner(base + ".key")
	if err != nil {
		return nil, err
	}
	a := &Authority{key: key, path: base}
	if a.Cert, err = readSole(base + ".crt"); err != nil {
		return nil, err
	}
	if !a.Cert.BasicConstraintsValid || !a.Cert.IsCA || a.Cert.KeyUsage != 0 && a.Cert.KeyUsage&x509.KeyUsageCertSign == 0 {
		return nil, fmt.Errorf("%s.crt is not the certificate of an authority: it needs CA:TRUE and keyCertSign; restore it from a backup, or give another", base)
	}
	if !fits(a.Cert, key) {
		return nil, fmt.Errorf("authority %s: %w; restore both files from a backup", base, ErrMismatch)
	}
	if now.After(a.Cert.NotAfter) {
		return nil, fmt.Errorf("authority %s: %w on %s and the clock says %s; set the clock, or replace the authority",
			base, ErrExpired, a.Cert.NotAfter.Format(time.DateOnly), now.Format(time.DateOnly))
	}
	return a, nil
}

// fits reports whether a certificate is for a key.
func fits(c *x509.Certificate, key crypto.Signer) bool {
	public, ok := c.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(key.Public())
}

// CertFile is the path of the certificate in PEM.
func (a *Authority) CertFile() string { return a.path + ".crt" }

// KeyFile is the path of the private key in PEM.
func (a *Authority) KeyFile() string { return a.path + ".key" }

// Hash is the hex SHA-256 of the certificate, by which join tokens name it.
func (a *Authority) Hash() string { return Hash(a.Cert) }

// Hash is the hex SHA-256 of a certificate.
func Hash(c *x509.Certificate) string {
	h := sha256.Sum256(c.Raw)
	return hex.EncodeToString(h[:])
}

// PEM returns the certificate in PEM.
func (a *Authority) PEM() []byte { return encodeCert(a.Cert.Raw) }

func selfSign(path, name string, key *ecdsa.PrivateKey, now time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	t := &x509.Certificate{
		SerialNumber: serial,
		// The time makes the subject unique, so that clients that index
		// authorities by subject never mix up those of two clusters.
		Subject:               pkix.Name{CommonName: fmt.Sprintf("kedge-%s@%d", name, now.Unix())},
		NotBefore:             validFrom,
		NotAfter:              now.Add(AuthorityLife).UTC().Truncate(time.Second),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", path, err)
	}
	if err := atomicfile.Write(path, encodeCert(der), 0o644); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func newSerial() (*big.Int, error) {
	limit := new(big.Int).Lsh(big.NewInt(1), 127)
	n, err := rand.Int(rand.Reader, limit)
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// readSole reads a certificate in a file that has no other one. Programs that read the file trust all in it: beside the
// authority's own certificate, that of who has signed it would let in whatever else that one signs.
func readSole(path string) (*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if n := bytes.Count(data, []byte("-----BEGIN CERTIFICATE-----")); n > 1 {
		return nil, fmt.Errorf("%s holds %d certificates; leave only the authority's own, since whatever else is there would be trusted too", path, n)
	}
	return parseCert(path, data)
}
