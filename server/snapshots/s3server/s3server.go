// Package s3server runs an S3 server, versitygw, for tests. The server is built from a module of its own (scripts/s3server), so
// that it is no dependency of kedge.
//
// Only tests import it.
package s3server

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"kedge/internal/pki"
)

// What a client needs besides the address.
const (
	Bucket    = "snapshots"
	AccessKey = "kedge"
	SecretKey = "a secret of the test"
	Region    = "us-east-1"
)

// root is the folder of the module.
func root() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "scripts", "s3server", "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("the test does not run below the module's folder")
		}
		dir = filepath.Dir(dir)
	}
	return "", err
}

// program builds the server.
var program = sync.OnceValues(func() (string, error) {
	dir, err := root()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "build", "s3server", "versitygw")
	cmd := exec.Command("go", "build", "-C", filepath.Join(dir, "scripts", "s3server"), "-ldflags=-s -w", "-o", path, "github.com/versity/versitygw/cmd/versitygw")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the S3 server: %w: %s", err, out)
	}
	return path, nil
})

// Server is a running S3 server.
type Server struct {
	Addr   string // host:port
	CAFile string
	Data   string // folder with a folder for each bucket
}

// Start starts an S3 server with one bucket, which ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &Server{Data: filepath.Join(dir, "data")}
	ca, err := pki.EnsureAuthority(dir, "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	s.CAFile = ca.CertFile()
	pair, err := ca.EnsureLeaf(dir, "server", pki.Leaf{CommonName: "s3", IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{filepath.Join(s.Data, Bucket), filepath.Join(dir, "meta"), filepath.Join(dir, "users")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Addr = l.Addr().String()
	l.Close()
	var log bytes.Buffer
	// Attributes in files: not every file system has extended ones.
	cmd := exec.Command(path, "--port", s.Addr, "--access", AccessKey, "--secret", SecretKey, "--region", Region,
		"--cert", pair.CertFile, "--key", pair.KeyFile, "--keep-alive", "--iam-dir", filepath.Join(dir, "users"), "posix", "--sidecar", filepath.Join(dir, "meta"), s.Data)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("the S3 server said:\n%s", log.Bytes())
		}
	})
	for deadline := time.Now().Add(startWithin); ; time.Sleep(20 * time.Millisecond) {
		select {
		case <-ended:
			t.Fatalf("the S3 server has ended: %s", log.Bytes())
		default:
		}
		c, err := tls.Dial("tcp", s.Addr, &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			c.Close()
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("the S3 server does not answer: %v", err)
		}
	}
}

// startWithin is how long the server may take to start.
const startWithin = time.Minute

// AddUser makes a user who may do nothing in the bucket.
func (s *Server) AddUser(t *testing.T, access, secret string) {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, "admin", "--access", AccessKey, "--secret", SecretKey, "--endpoint-url", "https://"+s.Addr, "--allow-insecure",
		"create-user", "--access", access, "--secret", secret, "--role", "user").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}
