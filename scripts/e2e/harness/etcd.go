package harness

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"

	"kedge/internal/namespaces"
	"kedge/internal/pki"
)

// Etcd is a real etcd with one member, in a process of its own: the test's program, which becomes it.
type Etcd struct {
	Dir string // everything of it is below
	URL string // at which it answers
	// TLS in both directions; the certificate is for clients too. Empty for none.
	CA, Cert, Key string

	network *namespaces.Network // in which it listens; nil for the machine's own
	cmd     *exec.Cmd           // nil unless it runs
	alive   io.Closer           // its standard input
}

// etcdVar has the configuration of an etcd that the test's program becomes.
const etcdVar = "KEDGE_E2E_ETCD"

// externalVar gives each server with a cluster and a network of this machine an etcd of its own, in place of kedge's datastore: the tests
// of one node run on an external etcd. Those that are about kedge's datastore fail then.
const externalVar = "KEDGE_E2E_EXTERNAL_ETCD"

// NewEtcd makes an etcd that listens at an address, with TLS in both directions, not yet started. It is gone when the test ends.
func NewEtcd(t *testing.T, address net.IP) *Etcd {
	t.Helper()
	dir, err := os.MkdirTemp(BaseDir, "etcd")
	if err != nil {
		t.Fatal(err)
	}
	e := &Etcd{Dir: dir, URL: fmt.Sprintf("https://%s:2379", address)}
	authority, err := pki.EnsureAuthority(dir, "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	pair, err := authority.EnsureLeaf(dir, "etcd", pki.Leaf{CommonName: "etcd", IPs: []net.IP{address}, Client: true, Server: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	e.CA, e.Cert, e.Key = authority.CertFile(), pair.CertFile, pair.KeyFile
	t.Cleanup(func() {
		e.Kill()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return e
}

// ListenIn sets the network in which it listens. Call it before Start.
func (e *Etcd) ListenIn(n *namespaces.Network) { e.network = n }

// Flags are those of a server that uses it, whose machine has the files of TLS in a folder.
func (e *Etcd) Flags(folder string) []string {
	flags := []string{"--datastore-endpoint=" + e.URL}
	if e.CA != "" {
		in := func(file string) string { return filepath.Join(folder, filepath.Base(file)) }
		flags = append(flags, "--datastore-cafile="+in(e.CA), "--datastore-certfile="+in(e.Cert), "--datastore-keyfile="+in(e.Key))
	}
	return flags
}

// Start starts it and waits until it listens.
func (e *Etcd) Start() error {
	config, err := json.Marshal(e)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(e.Dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = "etcd-of-a-test"
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = append(os.Environ(), etcdVar+"="+string(config)), e.Dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	inside := func(f func() error) error {
		if e.network == nil {
			return f()
		}
		return e.network.Do(f)
	}
	// It ends with its standard input, so that it does not outlive a run that is killed.
	if e.alive, err = cmd.StdinPipe(); err != nil {
		return err
	}
	if err := inside(cmd.Start); err != nil {
		return err
	}
	e.cmd = cmd
	u, err := url.Parse(e.URL)
	if err != nil {
		return err
	}
	network, address := "tcp", u.Host
	if u.Scheme == "unix" {
		network, address = "unix", u.Path
	}
	for deadline := time.Now().Add(Patient(20 * time.Second)); ; time.Sleep(50 * time.Millisecond) {
		err := inside(func() error {
			c, err := net.Dial(network, address)
			if err == nil {
				err = c.Close()
			}
			return err
		})
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// Kill ends it as a crash does.
func (e *Etcd) Kill() {
	if e.cmd != nil {
		_ = e.cmd.Process.Kill()
		_ = e.cmd.Wait() // which closes the pipe too
		e.cmd = nil
	}
}

// becomeEtcd is what the test's program does in place of its tests when it is started by [Etcd.Start]. It returns when the etcd ends.
func becomeEtcd(config string) error {
	var e Etcd
	if err := json.Unmarshal([]byte(config), &e); err != nil {
		return err
	}
	at, err := url.Parse(e.URL)
	if err != nil {
		return err
	}
	peer := url.URL{Scheme: "unix", Host: "localhost:2380"} // a socket in the working directory
	advertised := url.URL{Scheme: "http", Host: "localhost:2379"}
	_ = os.Remove(peer.Host) // of a process that was killed
	if at.Scheme == "unix" {
		_ = os.Remove(at.Path)
	}
	c := embed.NewConfig()
	c.Dir, c.LogLevel, c.EnableGRPCGateway, c.UnsafeNoFsync = filepath.Join(e.Dir, "data"), "warn", false, true
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*at}, []url.URL{advertised}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.CertFile, c.ClientTLSInfo.KeyFile = e.CA, e.Cert, e.Key
	c.ClientTLSInfo.ClientCertAuth = e.CA != ""
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

// giveEtcd starts the etcd of a node before its first start, if the run is to have them.
func (n *Node) giveEtcd() error {
	if os.Getenv(externalVar) == "" || n.etcd != nil || n.Agent || n.Network != nil || n.Machine != nil || n.Cmd != nil {
		return nil
	}
	dir := filepath.Join(n.Dir, "etcd")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	n.etcd = &Etcd{Dir: dir, URL: "unix://" + filepath.Join(dir, "socket")}
	n.Flags = append(n.Flags, n.etcd.Flags("")...)
	return n.etcd.Start()
}
