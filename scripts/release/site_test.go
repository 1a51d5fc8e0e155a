package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"aead.dev/minisign"

	"kedge/appliance/release"
)

// site serves a release by HTTPS on this machine.
type site struct {
	url   string
	ca    string // file with the certificate of the authority
	key   string // public key of the release
	mu    sync.Mutex
	files map[string][]byte
	cut   string // the path whose content is cut off in transit
}

func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	content, ok := s.files[r.URL.Path]
	cut := s.cut == r.URL.Path
	s.mu.Unlock()
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(content)))
	if cut {
		_, _ = w.Write(content[:len(content)/2])
		panic(http.ErrAbortHandler)
	}
	_, _ = w.Write(content)
}

// path is that of a file of the release.
func path(name string) string { return "/" + version + "/" + name }

// newSite returns a site with a signed release for this machine.
func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{files: map[string][]byte{"/channels/stable": []byte(version + "\n"), "/channels/latest": []byte("v1.3.0-rc.1\n")}}
	_, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.key = secret.Public().(release.Key).String()
	s.release(t, version, secret, executable)

	cert, ca := certificate(t)
	s.ca = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(s.ca, ca, 0o644); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(s)
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	// busybox's wget calls openssl wrongly if there is an address in place of a name.
	s.url = strings.Replace(server.URL, "127.0.0.1", "localhost", 1)
	return s
}

// release adds the files of a release.
func (s *site) release(t *testing.T, version string, secret minisign.PrivateKey, program string) {
	t.Helper()
	var l release.List
	for name, content := range map[string]string{release.Executable(runtime.GOARCH): program, release.VersionName: version + "\n"} {
		if err := l.Add(name, strings.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		s.files["/"+version+"/"+name] = []byte(content)
	}
	signature, err := sign(l.Text(), secret, version)
	if err != nil {
		t.Fatal(err)
	}
	s.files["/"+version+"/"+release.ListName] = l.Text()
	s.files["/"+version+"/"+release.SignatureName] = signature
}

// certificate returns a certificate for localhost and that of its authority.
func certificate(t *testing.T) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority of a test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
}
