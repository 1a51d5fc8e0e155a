package node

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/internal/pki"
	"kedge/scripts/e2e/harness"
)

const day = 24 * time.Hour

// TestClockBehind: a clock that shows a time before the executable was built is waited
// for. This executable was built in the year 2100.
func TestClockBehind(t *testing.T) {
	t.Parallel()
	later := harness.InProject("build/e2e/kedge-of-2100")
	if _, err := os.Stat(later); err != nil {
		t.Fatal("run make build-e2e:", err)
	}
	n := harness.Own(t)
	n.Program = later
	if err := n.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		if log := n.Tail(50); !strings.Contains(log, `and this kedge was built on 2100-01-01; set the clock, or connect a time server"`) {
			return errors.New("it does not say what it waits for:\n" + log)
		}
		return nil
	})
	if strings.Count(n.Tail(50), "waiting for the right time") != 1 {
		t.Errorf("once is enough:\n%s", n.Tail(50))
	}
	select {
	case <-n.Done:
		t.Fatalf("it ended: %v", n.Err)
	default:
	}
	for _, path := range []string{"server", "containerd", "kubelet"} {
		if _, err := os.Stat(filepath.Join(n.DataDir(), path)); err == nil {
			t.Errorf("%s was made while the clock is wrong", path)
		}
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"status"}, "set it, or connect a time server"},
		{[]string{"token", "ls"}, "kedge cannot do that yet: clock: "},
	} {
		out, err := exec.Command(harness.Binary(), append(tc.args, "--run-dir="+n.RunDir())...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), tc.want) {
			t.Errorf("%v (%v) does not say %q:\n%s", tc.args, err, tc.want, out)
		}
	}
	n.Stop(t, syscall.SIGTERM, 5*time.Second)
}

// certificateOf reads one of the node's.
func certificateOf(t *testing.T, n *harness.Node, name string) *x509.Certificate {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.DataDir(), "server/tls", name+".crt"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(data)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestCertificatesOfAnotherTime: authorities and certificates that were made while the
// clock was five years ahead, and such that have expired or nearly so, are no obstacle.
func TestCertificatesOfAnotherTime(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	tls := filepath.Join(n.DataDir(), "server/tls")
	if err := os.MkdirAll(tls, 0o700); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	ahead := now.Add(5 * 365 * day)
	hashes := map[string]string{}
	authority := func(name string, at time.Time) *pki.Authority {
		a, err := pki.EnsureAuthority(tls, name, at)
		if err != nil {
			t.Fatal(err)
		}
		hashes[name] = a.Hash()
		return a
	}
	for _, name := range []string{"server-ca", "kubelet-ca", "client-ca", "request-header-ca"} {
		authority(name, ahead)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("box", "exec sleep 3600", ""))
	n.WaitPod(t, ns, "box", false)
	n.Stop(t, syscall.SIGTERM, 10*time.Second)

	serials := map[string]string{}
	for _, c := range []struct {
		name, ca string
		signed   time.Time
	}{
		{"serving-kube-apiserver", "server-ca", ahead},
		{"serving-kubelet", "kubelet-ca", now.Add(-400 * day)},
		{"client-kube-apiserver", "client-ca", now.Add(-300 * day)},
		{"client-admin", "client-ca", ahead},
		{"client-auth-proxy", "request-header-ca", now.Add(-364 * day)},
	} {
		old := certificateOf(t, n, c.name)
		want := pki.Leaf{CommonName: old.Subject.CommonName, Organizations: old.Subject.Organization, DNSNames: old.DNSNames, IPs: old.IPAddresses}
		for _, u := range old.ExtKeyUsage {
			want.Client = want.Client || u == x509.ExtKeyUsageClientAuth
			want.Server = want.Server || u == x509.ExtKeyUsageServerAuth
		}
		if err := os.Remove(filepath.Join(tls, c.name+".crt")); err != nil {
			t.Fatal(err)
		}
		if _, err := authority(c.ca, now).EnsureLeaf(tls, c.name, want, c.signed); err != nil {
			t.Fatal(err)
		}
		serials[c.name] = certificateOf(t, n, c.name).SerialNumber.String()
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	for name, serial := range serials {
		c := certificateOf(t, n, name)
		if c.SerialNumber.String() == serial {
			t.Errorf("%s, valid until %s, was not renewed", name, c.NotAfter)
		}
		if left := time.Until(c.NotAfter); left < 360*day || left > 366*day {
			t.Errorf("%s is now valid for %s", name, left)
		}
	}
	for name, hash := range hashes {
		if authority(name, now); hashes[name] != hash {
			t.Errorf("%s was replaced", name)
		}
	}
	// The API, its way to the kubelet, and back.
	harness.Eventually(t, 10*time.Second, func() error {
		_, err := n.TryKubectl(nil, "exec", "-n", ns, "box", "--", "true")
		return err
	})
	if got := n.RunPod(t, ns, "new", "echo works", ""); got != "works\n" {
		t.Errorf("a new pod prints %q", got)
	}
}
