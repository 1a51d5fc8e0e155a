package hostpaths

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestClaim(t *testing.T) {
	pod := func(p Places) {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(p.Kubelet, "pods", "uid"), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	fresh := func() (own, host Places) { return Below(t.TempDir()), Below(t.TempDir()) }
	claim := func(want string, use, other Places, ofHost bool) func() error {
		t.Helper()
		release, err := Claim(use, other, ofHost)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Fatalf("claimed with %v, want %q", err, want)
		}
		if release != nil {
			t.Cleanup(func() { release() })
		}
		return release
	}

	own, host := fresh()
	claim("", own, host, false)
	pod(own)
	claim("", own, host, false)
	claim("kedge killall", host, own, true) // its pods would lose their volumes

	own, host = fresh()
	release := claim("", host, own, true)
	pod(host)
	claim("another node of this machine", host, own, true)
	claim("", own, host, false) // another node, which does not want them
	if err := release(); err != nil {
		t.Fatal(err)
	}
	claim("kedge killall", own, host, false)
	claim("", host, own, true)

	own, host = fresh()
	pod(host) // another kubelet's
	claim("pods of another kubelet", host, own, true)
	claim("", own, host, false)
}
