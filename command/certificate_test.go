package command

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/internal/errorkind"
	"kedge/internal/pki"
)

// TestCertificateCommands: the exit code of check says whether a certificate needs attention, and a stopped node's are renewed
// in its data directory.
func TestCertificateCommands(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("the commands need root")
	}
	ends := time.Date(2027, 3, 4, 0, 0, 0, 0, time.UTC)
	all := []pki.Examined{
		{Name: "ca", File: "/d/ca.crt", Names: []string{"the ca"}, Authority: "the ca", CA: true, Ends: ends, UsedBy: "signs"},
		{Name: "peer", File: "/d/peer.crt", Names: []string{"n1", "192.0.2.1"}, Authority: "the ca", Ends: ends, UsedBy: "peers"},
	}
	p := newProgram()
	var renewed []string
	var failure error
	p.Certificates.List = func(dataDir, kubeconfig string) ([]pki.Examined, error) {
		if dataDir != "/d" || kubeconfig != "/k" {
			t.Errorf("asked for %s and %s", dataDir, kubeconfig)
		}
		return all, failure
	}
	p.Certificates.Rotate = func(_ context.Context, dataDir string, names []string) ([]string, error) {
		renewed = append([]string{dataDir}, names...)
		return names[:1], failure
	}
	run := func(command string) (int, string, string) {
		t.Helper()
		return p.run(append(strings.Fields("certificate "+command), "--config=/dev/null", "--data-dir=/d", "--write-kubeconfig=/k", "--run-dir="+t.TempDir())...)
	}
	if code, out, errOut := run("check"); code != 0 || out != "all 2 certificates are good\n" || errOut != "" {
		t.Errorf("check: %d, %q, %q", code, out, errOut)
	}
	const header = "NAME  ENDS        PROBLEM  AUTHORITY  USED BY  FILE         NAMES\n"
	if code, out, _ := run("ls"); code != 0 || out != header+"ca    2027-03-04  -        itself     signs    /d/ca.crt    the ca\npeer  2027-03-04  -        the ca     peers    /d/peer.crt  n1,192.0.2.1\n" {
		t.Errorf("ls: %d, %q", code, out)
	}
	all[1] = pki.Examined{Name: "peer", File: filepath.Join("/d", "peer.crt"), UsedBy: "peers", Problem: "it is missing"}
	if code, out, _ := run("check"); code != 3 || strings.Contains(out, "signs") || !strings.Contains(out, "it is missing") {
		t.Errorf("check: %d, %q", code, out)
	}
	if code, out, _ := run("check --output=json"); code != 3 || !strings.Contains(out, `"problem": "it is missing"`) || strings.Contains(out, `"ends"`) {
		t.Errorf("check: %d, %q", code, out)
	}
	if code, out, _ := run("rotate peer ca"); code != 0 || out != "peer\n" || strings.Join(renewed, " ") != "/d peer ca" {
		t.Errorf("rotate: %d, %q, %q", code, out, renewed)
	}
	failure = errorkind.Permanent(errors.New("there are none"))
	for _, command := range []string{"ls", "check", "rotate peer"} {
		if code, _, errOut := run(command); code != errorkind.ExitConfig || errOut != "kedge: there are none\n" {
			t.Errorf("%s: %d, %q", command, code, errOut)
		}
	}
}
