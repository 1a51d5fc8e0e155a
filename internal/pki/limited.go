package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"math/big"
	"net"
	"net/netip"
)

// Limited returns another certificate of the authority, in PEM, with name constraints: its
// verifiers reject certificates for one of the names or for an address of the ranges. The same
// arguments give the same bytes.
func (a *Authority) Limited(names []string, ranges []netip.Prefix) ([]byte, error) {
	t := &x509.Certificate{
		Subject: a.Cert.Subject, SubjectKeyId: a.Cert.SubjectKeyId,
		NotBefore: a.Cert.NotBefore, NotAfter: a.Cert.NotAfter,
		KeyUsage: a.Cert.KeyUsage, BasicConstraintsValid: true, IsCA: true,
		PermittedDNSDomainsCritical: true, ExcludedDNSDomains: names,
	}
	sum := sha256.New()
	sum.Write(a.Cert.Raw)
	for _, n := range names {
		fmt.Fprintln(sum, n)
	}
	for _, r := range ranges {
		fmt.Fprintln(sum, r)
		t.ExcludedIPRanges = append(t.ExcludedIPRanges, &net.IPNet{IP: r.Masked().Addr().AsSlice(), Mask: net.CIDRMask(r.Bits(), r.Addr().BitLen())})
	}
	t.SerialNumber = new(big.Int).SetBytes(sum.Sum(nil)[:15])
	der, err := x509.CreateCertificate(nil, t, t, a.key.Public(), a.key) // deterministic
	if err != nil {
		return nil, fmt.Errorf("sign a limited certificate of %s: %w", a.path, err)
	}
	return encodeCert(der), nil
}
