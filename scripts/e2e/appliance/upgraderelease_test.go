package appliance

import (
	"bytes"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"aead.dev/minisign"

	"kedge/appliance/release"
	"kedge/internal/control"
	"kedge/scripts/e2e/harness"
)

// releaseSite serves releases over HTTPS in the network of a test's machines.
type releaseSite struct {
	url    string
	host   netip.Addr        // where it is
	ca     []byte            // the certificate of its authority
	files  map[string][]byte // by path; complete before the first request
	secret minisign.PrivateKey
}

// newReleaseSite makes a site with a key of its own, and without releases.
func newReleaseSite(t *testing.T, f *harness.Fleet) *releaseSite {
	t.Helper()
	s := &releaseSite{files: map[string][]byte{}}
	var err error
	if _, s.secret, err = minisign.GenerateKey(nil); err != nil {
		t.Fatal(err)
	}
	var l net.Listener
	host := f.JoinHost(t)
	if err := host.Do(func() (err error) { l, err = net.Listen("tcp4", ":443"); return err }); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		content, found := s.files[r.URL.Path]
		if !found {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(content)
	}))
	srv.Listener.Close()
	srv.Listener, srv.Config.ErrorLog = l, log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(func() {
		srv.Close()
		host.Close()
	})
	s.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	s.url = "https://example.com" // the name in httptest's certificate
	s.host = netip.AddrFrom4([4]byte{192, 0, 2, f.Joined})
	return s
}

// knownTo makes a machine find the site, and believe its certificate if a program reads the file caFile or starts later.
func (s *releaseSite) knownTo(t *testing.T, n *harness.Node) {
	t.Helper()
	hosts, err := os.ReadFile(n.Machine.Disk("/etc/hosts"))
	if err != nil {
		t.Fatal(err)
	}
	writeOn(t, n, "/etc/hosts", append(hosts, s.host.String()+" example.com\n"...))
	writeOn(t, n, caFile, s.ca)
}

// caFile is one of the places where Go looks for certificates. Their usual place is that of the test's machine, and read-only.
const caFile = "/etc/pki/tls/certs/example.pem"

// trustedBy makes a machine trust the key of the releases.
func (s *releaseSite) trustedBy(t *testing.T, n *harness.Node) {
	t.Helper()
	writeOn(t, n, release.TrustedKeysFile, []byte(s.secret.Public().(release.Key).String()+"\n"))
}

func writeOn(t *testing.T, n *harness.Node, path string, data []byte) {
	t.Helper()
	path = n.Machine.Disk(path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

// release adds a signed release. Its files may be changed afterwards.
func (s *releaseSite) release(t *testing.T, version string, program []byte) {
	t.Helper()
	var list release.List
	for name, content := range map[string][]byte{release.Executable(runtime.GOARCH): program, release.VersionName: []byte(version + "\n")} {
		if err := list.Add(name, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		s.files["/"+version+"/"+name] = content
	}
	s.files["/"+version+"/"+release.ListName] = list.Text()
	s.files["/"+version+"/"+release.SignatureName] = signed(t, list.Text(), s.secret)
}

func signed(t *testing.T, list []byte, secret minisign.PrivateKey) []byte {
	t.Helper()
	r := minisign.NewReader(bytes.NewReader(list))
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Fatal(err)
	}
	return r.SignWithComments(secret, "kedge", "of a test")
}

// TestUpgradeFromRelease: a node that trusts a key is upgraded from a server, by a version and by an address. What is not signed
// by the key, is not what was signed, or is not there, is refused in a sentence, and the node is not touched. KEDGE_TEST_LONG makes
// it two upgrades in place of one by the address.
func TestUpgradeFromRelease(t *testing.T) {
	s := newUpgradeSite(t)
	site := newReleaseSite(t, s.Fleet)
	kedge, err := os.ReadFile(harness.Binary())
	if err != nil {
		t.Fatal(err)
	}
	program := func(name string) []byte { return otherVersion(bytes.Clone(kedge), name) }
	name := release.Executable(runtime.GOARCH)
	_, stranger, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"v2.0.0", "v2.1.0"} {
		site.release(t, version, program(version))
	}
	for _, version := range []string{"v2.2.0-hash", "v2.2.0-key", "v2.2.0-list", "v2.2.0-unsigned", "v2.2.0-gone"} {
		site.release(t, version, []byte("of "+version))
	}
	at := func(version, file string) string { return "/" + version + "/" + file }
	site.files[at("v2.2.0-hash", name)] = []byte("of somebody else")
	site.files[at("v2.2.0-key", release.SignatureName)] = signed(t, site.files[at("v2.2.0-key", release.ListName)], stranger)
	site.files[at("v2.2.0-list", release.ListName)] = bytes.ToUpper(site.files[at("v2.2.0-list", release.ListName)])
	delete(site.files, at("v2.2.0-unsigned", release.SignatureName))
	delete(site.files, at("v2.2.0-gone", name))
	for _, file := range []string{name, release.ListName, release.SignatureName, release.VersionName} {
		site.files[at("v9.0.0", file)] = site.files[at("v2.0.0", file)] // an earlier release under a later name
	}
	accepted := []string{"--version=v2.0.0", "--url=" + site.url + "/v2.1.0"}
	if os.Getenv(longVar) == "" {
		accepted = accepted[1:]
	}
	site.files["/channels/stable"], site.files["/channels/latest"] = []byte("v2.1.0\n"), []byte("../v2.1.0\n")

	site.knownTo(t, s.Node)
	site.trustedBy(t, s.Node)
	// upgrade runs the installed executable, as users do.
	upgrade := func(ca string, args ...string) (string, error) {
		return s.Machine.Output(t.Context(), append([]string{"env", "SSL_CERT_DIR=/none", "SSL_CERT_FILE=" + ca, "KEDGE_URL=" + site.url, installedProgram, "upgrade", "--observe=2s"}, args...)...)
	}
	before, err := control.GetReport(t.Context(), s.RunDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ ca, arg, want string }{
		{"/dev/null", "--version=v2.0.0", "certificate signed by unknown authority"},
		{caFile, "--version=v3.0.0", "https://example.com/v3.0.0/SHA256SUMS cannot be fetched: the server answers 404 Not Found"},
		{caFile, "--url=" + site.url + "/none", "https://example.com/none/SHA256SUMS cannot be fetched: the server answers 404 Not Found"},
		{caFile, "--version=v2.2.0-gone", name + " cannot be fetched: the server answers 404 Not Found"},
		{caFile, "--version=v2.2.0-unsigned", release.SignatureName + " cannot be fetched: the server answers 404 Not Found"},
		{caFile, "--version=v2.2.0-key", "it is signed with the unknown key"},
		{caFile, "--url=" + site.url + "/v2.2.0-key/", "it is signed with the unknown key"},
		{caFile, "--version=v2.2.0-list", release.ListName + " is not the list that was signed"},
		{caFile, "--version=v2.2.0-hash", name},
		{caFile, "--url=" + site.url + "/v2.2.0-hash", name},
		{caFile, "--version=v9.0.0", "v9.0.0"},
		{caFile, "--version=../v2.0.0", "is not the name of a version"},
		{caFile, "--channel=latest", "does not have the name of a version"},
		{caFile, "--channel=none", "https://example.com/channels/none cannot be fetched: the server answers 404 Not Found"},
		{caFile, "--file=/opt/kedge/kedge", "is not signed"},
	} {
		out, err := upgrade(tc.ca, tc.arg)
		if err == nil || !strings.Contains(out, tc.want) || strings.Count(out, "\n") > 1 {
			t.Errorf("%s: %v\n%s", tc.arg, err, out)
		}
		t.Logf("%s: %s", tc.arg, out)
	}
	after, err := control.GetReport(t.Context(), s.RunDir())
	if err != nil || after.PID != before.PID {
		t.Errorf("the process was %d and is %d: %v", before.PID, after.PID, err)
	}
	for _, folder := range []string{"upgrade", "snapshots"} {
		if left, err := filepath.Glob(s.Machine.Disk("/var/lib/kedge/" + folder + "/*")); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}

	for _, arg := range accepted {
		version := arg[len(arg)-len("v2.0.0"):]
		s.write("of-" + version)
		if out, err := upgrade(caFile, arg); err != nil || !strings.Contains(out, "The new version is ready.") {
			t.Fatalf("%s: %v\n%s", arg, err, out)
		}
		s.stop()
		if o := s.supervise(nil); o.Result != "upgraded" {
			t.Errorf("%s: %+v", arg, o)
		}
		if got, err := os.ReadFile(s.Machine.Disk(installedProgram)); err != nil || !bytes.Equal(got, site.files[at(version, name)]) {
			t.Errorf("%s: another executable is installed, %v", arg, err)
		}
		s.healthy("of-" + version)
	}
	// The last one is the newest of the channel stable.
	if out, err := upgrade(caFile); err == nil || !strings.Contains(out, "is installed already") {
		t.Errorf("the newest: %v\n%s", err, out)
	}
}
