package peers

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/internal/pki"
)

// testMeshes returns an open mesh for each name, with all others in its address book. The handler of each peer port
// answers with the name, in place of etcd.
func testMeshes(t *testing.T, names ...string) []*Mesh {
	t.Helper()
	ca, err := pki.EnsureAuthority(t.TempDir(), "peer-ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	var meshes []*Mesh
	for i, name := range names {
		b := NewAddressBook(t.TempDir(), name)
		if err := b.Identify("c1", fmt.Sprint(i+1)); err != nil {
			t.Fatal(err)
		}
		m := New(testConfig(t, ca, name), b, KernelNetwork{}, slog.New(slog.DiscardHandler), func() bool { return false })
		t.Cleanup(m.Close)
		m.SetSource(b.Self().loopbackAddr())
		m.SetAddresses([]netip.Addr{netip.MustParseAddr("127.0.0.1")})
		var h http.Handler = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) })
		m.etcdHandler.Store(&h)
		meshes = append(meshes, m)
	}
	for _, m := range meshes {
		for _, other := range meshes {
			if _, err := m.book.Merge([]Peer{other.book.Self()}); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Open(); err != nil {
			t.Fatal(err)
		}
	}
	return meshes
}

func testConfig(t *testing.T, ca *pki.Authority, name string) Config {
	t.Helper()
	leaf := pki.Leaf{CommonName: name, DNSNames: []string{ServerName}, Client: true, Server: true}
	pair, err := ca.EnsureLeaf(t.TempDir(), "peer", leaf, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	return Config{Port: port, CAFile: ca.CertFile(), CertFile: pair.CertFile, KeyFile: pair.KeyFile}
}

// awaitAlive waits until the mesh has a heartbeat of the other.
func awaitAlive(t *testing.T, m, other *Mesh) {
	t.Helper()
	id := other.book.Self().ID
	for deadline := time.Now().Add(20 * time.Second); !m.Status(id).Alive(time.Now()); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("member %s does not answer", id)
		}
	}
}

// get sends a request over TLS to the address and returns the answer.
func get(c *tls.Config, at string) (string, error) {
	conn, err := tls.Dial("tcp", at, c)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

// TestMeshForwardsConnections: a connection to the loopback address of a member reaches its peer port.
func TestMeshForwardsConnections(t *testing.T) {
	meshes := testMeshes(t, "a", "b")
	a, b := meshes[0], meshes[1]
	awaitAlive(t, a, b)
	awaitAlive(t, b, a)
	self := b.book.Self()
	if at := a.Location(self.ID); at != self.Addresses[0] {
		t.Errorf("location of b %v, want %v", at, self.Addresses)
	}
	if data, _, err := a.Get(t.Context(), self.Addresses[0], "/"); err != nil || string(data) != "b" {
		t.Errorf("b answered %q, %v", data, err)
	}
	at := netip.AddrPortFrom(self.loopbackAddr(), loopbackPort).String()
	if answer, err := get(a.tls, at); err != nil || !strings.HasSuffix(answer, "\r\nb") {
		t.Errorf("b answered %q, %v through the loopback proxy", answer, err)
	}
	if a.link(self.ID).probeAt(a.book.Self().Addresses[0]) {
		t.Error("a heartbeat to a was taken for an answer of b")
	}

	// The link to a member ends with its entry in the address book.
	if _, err := a.book.retain(func(Peer) bool { return false }); err != nil {
		t.Fatal(err)
	}
	a.reconcile()
	if at := a.Location(self.ID); at.IsValid() || a.Status(self.ID).Alive(time.Now()) {
		t.Errorf("b was removed, and its location is %v", at)
	}
}

// TestMeshRefusesUnknownPeers: a connection without a certificate gets no answer, and connections that send nothing do not
// keep members out.
func TestMeshRefusesUnknownPeers(t *testing.T) {
	meshes := testMeshes(t, "a", "b")
	a, b := meshes[0], meshes[1]
	awaitAlive(t, b, a)
	at := a.book.Self().Addresses[0].String()
	anonymous := b.tls.Clone()
	anonymous.GetClientCertificate = nil
	if answer, err := get(anonymous, at); err == nil || answer != "" {
		t.Errorf("without a certificate: %q, %v", answer, err)
	}
	silent := make([]net.Conn, 3*maxHandshakes)
	for i := range silent {
		var err error
		if silent[i], err = net.Dial("tcp", at); err != nil {
			t.Fatal(err)
		}
		defer silent[i].Close()
	}
	if !b.link(a.book.Self().ID).probeAt(a.book.Self().Addresses[0]) {
		t.Error("a member with an open connection got no answer to its heartbeat")
	}
	for _, conn := range silent {
		_ = conn.SetReadDeadline(time.Now().Add(2 * handshakeTimeout))
		if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatal("a connection that sent nothing is still open")
		}
	}
	if answer, err := get(b.tls, at); err != nil || !strings.HasSuffix(answer, "\r\na") {
		t.Errorf("after the flood a member got %q, %v", answer, err)
	}
}
