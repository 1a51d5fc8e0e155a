package external

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"kedge/internal/pki"
)

// etcd is a real etcd with one member, in a process of its own: the test's program, started with etcdVariable.
type etcd struct {
	Dir, URL      string
	CA, Cert, Key string // of TLS in both directions; empty for none

	cmd *exec.Cmd
}

const etcdVariable = "KEDGE_TEST_ETCD"

// newEtcd prepares an etcd at a free port, not yet started.
func newEtcd(t *testing.T, scheme string) *etcd {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	e := &etcd{Dir: t.TempDir(), URL: scheme + "://" + l.Addr().String()}
	t.Cleanup(func() { e.kill() })
	return e
}

// start starts it. It answers a moment later.
func (e *etcd) start(t *testing.T) {
	t.Helper()
	config, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	e.cmd = exec.Command("/proc/self/exe")
	e.cmd.Env, e.cmd.Dir, e.cmd.Stderr = append(os.Environ(), etcdVariable+"="+string(config)), e.Dir, t.Output()
	if _, err := e.cmd.StdinPipe(); err != nil { // it ends with its standard input, so that it does not outlive the test
		t.Fatal(err)
	}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
}

// kill ends it as a crash does.
func (e *etcd) kill() {
	if e.cmd != nil {
		_ = e.cmd.Process.Kill()
		_ = e.cmd.Wait()
		e.cmd = nil
	}
}

// runEtcd is the etcd's process.
func runEtcd(config string) error {
	var e etcd
	if err := json.Unmarshal([]byte(config), &e); err != nil {
		return err
	}
	at, err := url.Parse(e.URL)
	if err != nil {
		return err
	}
	peer := url.URL{Scheme: "unix", Host: "localhost:2380"} // a socket in the working directory
	c := embed.NewConfig()
	c.Dir, c.LogLevel, c.EnableGRPCGateway, c.UnsafeNoFsync = filepath.Join(e.Dir, "data"), "error", false, true
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*at}, []url.URL{*at}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.TickMs, c.ElectionMs = 50, 250
	c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.CertFile, c.ClientTLSInfo.KeyFile = e.CA, e.Cert, e.Key
	c.ClientTLSInfo.ClientCertAuth = e.CA != ""
	_ = os.Remove("localhost:2380") // of a process that was killed
	server, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		ended <- errors.Join(errors.New("the test has ended"), err)
	}()
	select {
	case err := <-server.Err():
		return err
	case err := <-ended:
		return err
	}
}

// certificates makes an authority and a certificate of it in a folder.
func certificates(t *testing.T, name string) (ca, cert, key string) {
	t.Helper()
	dir := t.TempDir()
	authority, err := pki.EnsureAuthority(dir, "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.EnsureLeaf(dir, name, pki.Leaf{CommonName: name, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Client: true, Server: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return authority.CertFile(), pair.CertFile, pair.KeyFile
}
