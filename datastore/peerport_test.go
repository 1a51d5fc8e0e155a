package datastore

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/internal/pki"
)

// Whoever cannot prove to be a member gets nothing from the peer port, and does not keep members from it.
func TestPeerPortRefusesStrangers(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b")
	a := nodes[0]
	at := fmt.Sprintf("127.0.0.1:%d", a.cfg.Peer.Port)

	_, client, err := peerTLS(a.cfg.Peer)
	if err != nil {
		t.Fatal(err)
	}
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
	_, foreign, err := peerTLS(other)
	if err != nil {
		t.Fatal(err)
	}
	foreign.RootCAs = client.RootCAs
	anonymous := client.Clone()
	anonymous.GetClientCertificate = nil
	old := client.Clone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	for name, stranger := range map[string]*tls.Config{
		"without a certificate": anonymous, "of another authority": foreign, "with TLS 1.2": old,
	} {
		if answer, err := get(stranger); err == nil || answer != "" {
			t.Errorf("a stranger %s got %q, %v", name, answer, err)
		}
	}

	// Connections that say nothing: some are refused, the others soon ended.
	silent := make([]net.Conn, 3*maxHandshakes)
	for i := range silent {
		if silent[i], err = net.Dial("tcp", at); err != nil {
			t.Fatal(err)
		}
		defer silent[i].Close()
	}
	put(t, nodes[1], "/a", "1")
	for _, conn := range silent {
		_ = conn.SetReadDeadline(time.Now().Add(2 * handshakeTime))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a connection that says nothing is still open")
		}
	}
	if answer, err := get(client); err != nil || !strings.Contains(answer, "200 OK") {
		t.Errorf("after that a member got %q, %v", answer, err)
	}
	put(t, nodes[1], "/a", "2")
}

// A certificate may be replaced while the store runs.
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
	_, client, err := peerTLS(b.cfg.Peer)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", a.cfg.Peer.Port), client)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := pki.PEM(conn.ConnectionState().PeerCertificates[0]); !strings.HasPrefix(string(after), string(got)) {
		t.Error("the peer port still shows the old certificate")
	}
}

func TestPeerConfigValidate(t *testing.T) {
	if err := (PeerConfig{}).validate(); err != nil {
		t.Errorf("a store that stays alone: %v", err)
	}
	bad := PeerConfig{Port: virtualPort, CAFile: "ca.crt", Addresses: []netip.Addr{netip.IPv4Unspecified()}}
	err := bad.validate()
	for _, want := range []string{"authority", "certificate", "key", "2378", "0.0.0.0"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not reported in: %v", want, err)
		}
	}
	c := testConfig("/x")
	c.Join = &Admission{Name: "other"}
	err = c.Validate()
	for _, want := range []string{"peer port", "incomplete", "not for this member"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not reported in: %v", want, err)
		}
	}
}

// Two books that have met agree, whatever each knew before.
func TestBookMerges(t *testing.T) {
	open := func(name, id string) *book {
		b, err := openBook(t.TempDir(), name)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.identify("c1", id); err != nil {
			t.Fatal(err)
		}
		return b
	}
	at := func(s string) []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(s)} }
	a := open("a", "1")
	if news, err := a.moved(at("192.0.2.1:2380")); err != nil || !news {
		t.Errorf("first address: %v, %v", news, err)
	}
	if news, err := a.moved(at("192.0.2.1:2380")); err != nil || news {
		t.Errorf("the same address again: %v, %v", news, err)
	}
	two := Peer{ID: "2", Name: "b", URL: newVirtualURL(), Addresses: at("192.0.2.2:2380"), Seq: 5}
	older := two
	older.Seq, older.Addresses = 4, at("192.0.2.9:2380")
	for _, tc := range []struct {
		p    Peer
		news bool
	}{{two, true}, {two, false}, {older, false}, {Peer{ID: "3", URL: "http://127.0.0.1:2380"}, false}} {
		if news, err := a.merge([]Peer{tc.p}); err != nil || news != tc.news {
			t.Errorf("%+v: %v, %v, want %v", tc.p, news, err, tc.news)
		}
	}
	// Somebody knows a later statement of ours than we do.
	if _, err := a.merge([]Peer{{ID: "1", URL: newVirtualURL(), Seq: 7, Addresses: at("192.0.2.8:2380")}}); err != nil {
		t.Fatal(err)
	}
	if self := a.self(); self.Seq != 8 || self.Addresses[0] != at("192.0.2.1:2380")[0] {
		t.Errorf("self is %+v", self)
	}
	again, err := openBook(filepath.Dir(a.path), "a")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprintf("%+v", again.get()), fmt.Sprintf("%+v", a.get()); got != want {
		t.Errorf("read again: %s\nwas: %s", got, want)
	}
	if _, err := a.retain(func(p Peer) bool { return p.ID != "2" }); err != nil || len(a.get().Others) != 0 {
		t.Errorf("others %+v, %v", a.get().Others, err)
	}
	if err := os.WriteFile(a.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openBook(filepath.Dir(a.path), "a"); err == nil {
		t.Error("a damaged book was opened")
	}
}

func TestVirtualAddress(t *testing.T) {
	for range 100 {
		if u := newVirtualURL(); !virtualAddress(u).IsValid() {
			t.Errorf("%s is not on loopback", u)
		}
	}
	for _, u := range []string{"http://127.64.0.1:2378", "https://127.0.0.1:2378", "https://127.64.0.1:2380", "https://10.0.0.1:2378", "x", ""} {
		if a := virtualAddress(u); a.IsValid() {
			t.Errorf("%q is taken for %v", u, a)
		}
	}
}
