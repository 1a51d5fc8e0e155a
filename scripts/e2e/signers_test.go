package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"testing"
	"time"

	certificatesv1 "k8s.io/api/certificates/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestSigners has each of the cluster's signers sign something: the authority must be the
// one that is believed about such certificates, and no other. Were a kubelet's signed by
// the API's, a node could stand in for the API.
func TestSigners(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	node := pkix.Name{CommonName: "system:node:" + ns, Organization: []string{"system:nodes"}}
	client := []certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth}
	for _, tc := range []struct {
		signer, authority string
		template          x509.CertificateRequest
		usages            []certificatesv1.KeyUsage
	}{
		{certificatesv1.KubeletServingSignerName, "kubelet-ca", x509.CertificateRequest{Subject: node, DNSNames: []string{"kubernetes"}},
			[]certificatesv1.KeyUsage{certificatesv1.UsageDigitalSignature, certificatesv1.UsageServerAuth}},
		{certificatesv1.KubeAPIServerClientKubeletSignerName, "client-ca", x509.CertificateRequest{Subject: node}, client},
		{certificatesv1.KubeAPIServerClientSignerName, "client-ca", x509.CertificateRequest{Subject: pkix.Name{CommonName: "jane-" + ns}}, client},
	} {
		kind := path.Base(tc.signer)
		cert := n.signed(t, ns+"-"+kind, tc.signer, tc.template, tc.usages...)
		var signedBy []string
		for _, authority := range []string{"server-ca", "kubelet-ca", "client-ca", "request-header-ca", "peer-ca"} {
			pool := x509.NewCertPool()
			data, err := os.ReadFile(filepath.Join(n.dataDir(), "server/tls", authority+".crt"))
			if err != nil || !pool.AppendCertsFromPEM(data) {
				t.Fatalf("%s: %v", authority, err)
			}
			if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err == nil {
				signedBy = append(signedBy, authority)
			}
		}
		if !slices.Equal(signedBy, []string{tc.authority}) {
			t.Errorf("what %s gives is signed by %q, want %s", tc.signer, signedBy, tc.authority)
		}
	}
}

// signed is the certificate that the cluster gives on a request that was approved.
func (n *node) signed(t *testing.T, name, signer string, template x509.CertificateRequest, usages ...certificatesv1.KeyUsage) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &template, key)
	if err != nil {
		t.Fatal(err)
	}
	requests := n.client.CertificatesV1().CertificateSigningRequests()
	if _, err := requests.Create(context.Background(), &certificatesv1.CertificateSigningRequest{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       certificatesv1.CertificateSigningRequestSpec{Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), SignerName: signer, Usages: usages},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.tryKubectl(nil, "delete", "csr", name) })
	n.kubectl(t, "certificate", "approve", name)
	var cert *x509.Certificate
	eventually(t, 20*time.Second, func() error {
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
