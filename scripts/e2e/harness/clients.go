package harness

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// InsecureClient is a client that calls as nobody and takes any certificate.
func InsecureClient() *http.Client {
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}

// SignedCertificate is the certificate that the cluster gives on a request that was approved.
func (n *Node) SignedCertificate(t *testing.T, name, signer string, template x509.CertificateRequest, usages ...certificatesv1.KeyUsage) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	requests := n.Client.CertificatesV1().CertificateSigningRequests()
	if _, err := requests.Create(context.Background(), &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       certificatesv1.CertificateSigningRequestSpec{Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), SignerName: signer, Usages: usages},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.TryKubectl(nil, "delete", "csr", name) })
	n.Kubectl(t, "certificate", "approve", name)
	var cert *x509.Certificate
	Eventually(t, 20*time.Second, func() error {
		csr, err := requests.Get(context.Background(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		block, _ := pem.Decode(csr.Status.Certificate)
		if block == nil {
			return fmt.Errorf("no certificate yet: %+v", csr.Status)
		}
		cert, err = x509.ParseCertificate(block.Bytes)
		return err
	})
	return cert
}
