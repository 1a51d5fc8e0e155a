package security

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"os"
	"path"
	"path/filepath"
	"slices"
	"testing"

	certificatesv1 "k8s.io/api/certificates/v1"

	"kedge/scripts/e2e/harness"
)

// TestSigners has each of the cluster's signers sign something: the authority must be the
// one that is believed about such certificates, and no other. Were a kubelet's signed by
// the API's, a node could stand in for the API.
func TestSigners(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
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
		cert := n.SignedCertificate(t, ns+"-"+kind, tc.signer, tc.template, tc.usages...)
		var signedBy []string
		for _, authority := range []string{"server-ca", "kubelet-ca", "client-ca", "request-header-ca", "peer-ca"} {
			pool := x509.NewCertPool()
			data, err := os.ReadFile(filepath.Join(n.DataDir(), "server/tls", authority+".crt"))
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
