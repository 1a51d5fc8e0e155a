package datastore

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/internal/pki"
)

// The bounds of package peers for connections in their handshake.
const (
	maxHandshakes = 64
	handshakeTime = 3 * time.Second
)

// peerClient returns the TLS configuration with which a member connects to the peer ports of others.
func peerClient(t *testing.T, c PeerConfig) *tls.Config {
	t.Helper()
	ca, err := os.ReadFile(c.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	return &tls.Config{MinVersion: tls.VersionTLS13, ServerName: PeerServerName, RootCAs: pool, Certificates: []tls.Certificate{pair}}
}

// An unauthenticated connection gets nothing from the peer port, and does not keep members out.
func TestPeerPortRefusesUnknownPeers(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b")
	a := nodes[0]
	at := fmt.Sprintf("127.0.0.1:%d", a.cfg.Peer.Port)

	client := peerClient(t, a.cfg.Peer)
	get := func(c *tls.Config) (string, error) {
		conn, err := tls.Dial("tcp", at, c)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintf(conn, "GET /members HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		answer, err := io.ReadAll(conn)
		return string(answer), err
	}
	if answer, err := get(client); err != nil || !strings.Contains(answer, "200 OK") {
		t.Errorf("a member got %q, %v", answer, err)
	}
	other := newTestCluster(t).peerConfig("a")
	foreign := peerClient(t, other)
	foreign.RootCAs = client.RootCAs
	anonymous := client.Clone()
	anonymous.Certificates = nil
	old := client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for name, unknown := range map[string]*tls.Config{
		"without a certificate": anonymous, "of another authority": foreign, "with TLS 1.2": old,
	} {
		if answer, err := get(unknown); err == nil || answer != "" {
			t.Errorf("a peer %s got %q, %v", name, answer, err)
		}
	}

	// Of connections that send nothing, some are refused, and the others are closed soon.
	silent := make([]net.Conn, 3*maxHandshakes)
	for i := range silent {
		var err error
		if silent[i], err = net.Dial("tcp", at); err != nil {
			t.Fatal(err)
		}
		defer silent[i].Close()
	}
	put(t, nodes[1], "/a", "1")
	for _, conn := range silent {
		_ = conn.SetReadDeadline(time.Now().Add(2 * handshakeTime))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a connection that sent nothing is still open")
		}
	}
	if answer, err := get(client); err != nil || !strings.Contains(answer, "200 OK") {
		t.Errorf("after the flood a member got %q, %v", answer, err)
	}
	put(t, nodes[1], "/a", "2")
}

// The certificate may be replaced while the store runs.
func TestPeerCertificateIsRenewed(t *testing.T) {
	c := newTestCluster(t)
	a := c.node("a").start()
	file := a.cfg.Peer.CertFile
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	leaf := pki.Leaf{CommonName: "a", DNSNames: []string{PeerServerName}, Client: true, Server: true}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ca.EnsureLeaf(filepath.Dir(file), "peer", leaf, time.Now()); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(file)
	if err != nil || string(before) == string(after) {
		t.Fatalf("the certificate is the old one: %v", err)
	}
	b := c.join(a, "b")
	client := peerClient(t, b.cfg.Peer)
	conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", a.cfg.Peer.Port), client)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := pki.PEM(conn.ConnectionState().PeerCertificates[0]); !strings.HasPrefix(string(after), string(got)) {
		t.Error("the peer port still shows the old certificate")
	}
}

func TestAdmissionValidate(t *testing.T) {
	c := testConfig("/x")
	c.Join = &Admission{Name: "other"}
	err := c.Validate()
	for _, want := range []string{"peer port", "incomplete", "not for this member"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not reported in: %v", want, err)
		}
	}
}
