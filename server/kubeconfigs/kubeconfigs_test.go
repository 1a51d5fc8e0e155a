package kubeconfigs

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"kedge/internal/pki"
	"kedge/internal/test/await"
)

var begin = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)

// cluster is the kubeconfigs of a cluster whose clock is set by the test.
type cluster struct {
	*Kubeconfigs
	api *fake.Clientset
	at  time.Time
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	ca, err := pki.EnsureAuthority(t.TempDir(), "client-ca", begin)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{api: fake.NewClientset(), at: begin}
	c.Kubeconfigs = New(ca, c.api)
	c.now = func() time.Time { return c.at }
	return c
}

// create makes a kubeconfig and returns its certificate.
func (c *cluster) create(t *testing.T, s Spec) (*x509.Certificate, Listed) {
	t.Helper()
	if s.TTL == 0 {
		s.TTL = DefaultTTL
	}
	chain, made, err := c.Create(t.Context(), s, request(t))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := pki.ParseCertificate(s.User, chain)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(chain, c.authority.PEM()) {
		t.Error("the certificate is not followed by its authority's")
	}
	return cert, made
}

func request(t *testing.T) []byte {
	t.Helper()
	key, _, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	data, err := pki.Request(key)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// authenticate returns the user of a request with the certificate.
func (c *cluster) authenticate(cert *x509.Certificate) (user.Info, bool, error) {
	r := &http.Request{TLS: &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}}
	answer, ok, err := c.Authenticator().AuthenticateRequest(r)
	if !ok {
		return nil, false, err
	}
	return answer.User, true, err
}

func TestCreatedKubeconfigAuthenticates(t *testing.T) {
	c := newCluster(t)
	cert, made := c.create(t, Spec{User: "anna@example.org", Groups: []string{"dev", Administrators}, TTL: time.Hour})
	who, ok, err := c.authenticate(cert)
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	if who.GetName() != "anna@example.org" || !slices.Equal(who.GetGroups(), []string{"dev", Administrators, user.AllAuthenticated}) {
		t.Errorf("it is %s of %v", who.GetName(), who.GetGroups())
	}
	if id := who.GetExtra()[user.CredentialIDKey]; len(id) != 1 || !strings.HasPrefix(id[0], "X509SHA256=") {
		t.Errorf("the audit log does not learn which certificate it was: %v", id)
	}
	// The usual verifier of clients, as kubelets and extension API servers have it, knows no revoked ones.
	roots := x509.NewCertPool()
	roots.AddCert(c.authority.Cert)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: begin, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err == nil {
		t.Error("it is valid where its revocation is not known")
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: begin, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("a server can use it")
	}
	if !made.Ends.Equal(begin.Add(time.Hour)) || !made.Created.Equal(begin) {
		t.Errorf("it is valid from %s to %s", made.Created, made.Ends)
	}
	c.at = begin.Add(time.Hour + time.Second)
	if _, ok, err := c.authenticate(cert); ok || err == nil {
		t.Errorf("it is valid after its end: %v", err)
	}
}

func TestAuthenticatorLeavesOthersAlone(t *testing.T) {
	c := newCluster(t)
	key, _, err := pki.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := c.authority.Sign(&key.PublicKey, pki.Leaf{CommonName: "admin", Client: true}, time.Hour, begin)
	if err != nil {
		t.Fatal(err)
	}
	usual, err := pki.ParseCertificate("admin", chain)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok, err := c.authenticate(usual); ok || err != nil {
		t.Errorf("a usual certificate: %v, %v", ok, err)
	}
	if _, ours := c.Holder(usual); ours {
		t.Error("a usual certificate counts as a kubeconfig's")
	}
	if _, ok, err := c.Authenticator().AuthenticateRequest(&http.Request{}); ok || err != nil {
		t.Errorf("without TLS: %v, %v", ok, err)
	}
	foreign, _ := newCluster(t).create(t, Spec{User: "anna"})
	if _, ok, err := c.authenticate(foreign); ok || err == nil {
		t.Errorf("a certificate of another cluster: %v, %v", ok, err)
	}
}

func TestSpec(t *testing.T) {
	many := make([]string, maxGroups+1)
	for i := range many {
		many[i] = "g" + strings.Repeat("x", i)
	}
	good := Spec{User: "ci", TTL: time.Hour}
	with := func(change func(*Spec)) Spec { s := good; change(&s); return s }
	for name, tc := range map[string]struct {
		spec Spec
		want string // empty: it is good
	}{
		"plain":                 {good, ""},
		"all":                   {Spec{User: "a/b:c@d.e", Groups: []string{"x", Administrators}, TTL: MaxTTL, Namespace: "web", Server: "https://kedge.example.org:6443"}, ""},
		"IPv6":                  {with(func(s *Spec) { s.Server = "https://[2001:db8::1]:6443" }), ""},
		"no name":               {with(func(s *Spec) { s.User = "" }), "cannot be the name of a user"},
		"space":                 {with(func(s *Spec) { s.User = "anna b" }), "cannot be the name of a user"},
		"long":                  {with(func(s *Spec) { s.User = strings.Repeat("a", 65) }), "at most 64"},
		"line":                  {with(func(s *Spec) { s.User = "anna\n" }), "cannot be the name of a user"},
		"node":                  {with(func(s *Spec) { s.User = "system:node:n1" }), "reserved for the cluster"},
		"service account":       {with(func(s *Spec) { s.User = "system:serviceaccount:kube-system:default" }), "reserved for the cluster"},
		"scheduler":             {with(func(s *Spec) { s.User = "system:kube-scheduler" }), "reserved for the cluster"},
		"client of kubelets":    {with(func(s *Spec) { s.User = "kube-apiserver-kubelet-client" }), "reserved for the cluster"},
		"nodes":                 {with(func(s *Spec) { s.Groups = []string{"system:nodes"} }), "only system:masters can be given"},
		"network":               {with(func(s *Spec) { s.Groups = []string{"system:kedge:network"} }), "reserved for the cluster"},
		"service accounts":      {with(func(s *Spec) { s.Groups = []string{"system:serviceaccounts"} }), "reserved for the cluster"},
		"name of a group":       {with(func(s *Spec) { s.Groups = []string{"a,b"} }), "cannot be the name of a group"},
		"empty group":           {with(func(s *Spec) { s.Groups = []string{""} }), "cannot be the name of a group"},
		"twice":                 {with(func(s *Spec) { s.Groups = []string{"a", "a"} }), "given twice"},
		"too many groups":       {with(func(s *Spec) { s.Groups = many }), "at most 32 groups"},
		"too short":             {with(func(s *Spec) { s.TTL = time.Second }), "is not between"},
		"too long":              {with(func(s *Spec) { s.TTL = MaxTTL + 1 }), "is not between"},
		"namespace":             {with(func(s *Spec) { s.Namespace = "Web" }), "cannot be the name of a namespace"},
		"plain HTTP":            {with(func(s *Spec) { s.Server = "http://kedge:6443" }), "is not a URL such as"},
		"no URL":                {with(func(s *Spec) { s.Server = "kedge:6443" }), "is not a URL such as"},
		"password in the URL":   {with(func(s *Spec) { s.Server = "https://a:b@kedge:6443" }), "is not a URL such as"},
		"parameters in the URL": {with(func(s *Spec) { s.Server = "https://kedge:6443?x" }), "is not a URL such as"},
	} {
		err := tc.spec.Validate()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
		if tc.want != "" {
			c := newCluster(t)
			if _, _, err := c.Create(t.Context(), tc.spec, request(t)); err == nil {
				t.Errorf("%s was signed", name)
			}
		}
	}
}

func TestListAndRevoke(t *testing.T) {
	c := newCluster(t)
	_, first := c.create(t, Spec{User: "ci", Groups: []string{"dev"}, TTL: time.Hour})
	c.at = begin.Add(time.Minute)
	_, second := c.create(t, Spec{User: "ci"})
	_, other := c.create(t, Spec{User: "anna"})
	ids := func(all []Listed) (out []string) {
		for _, l := range all {
			out = append(out, l.ID)
		}
		return out
	}
	list := func() []Listed {
		t.Helper()
		all, err := c.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	all := list()
	if want := []string{other.ID, first.ID, second.ID}; !slices.Equal(ids(all), want) {
		t.Fatalf("listed are %v, want %v", ids(all), want)
	}
	if l := all[1]; l.User != "ci" || !slices.Equal(l.Groups, []string{"dev"}) || !l.Created.Equal(begin) || !l.Ends.Equal(begin.Add(time.Hour)) || !l.Revoked.IsZero() {
		t.Errorf("listed is %+v", l)
	}
	for _, tc := range [][2]string{{"nobody", ""}, {"anna", first.ID}, {"ci", "000000000000"}} {
		if revoked, err := c.Revoke(t.Context(), tc[0], tc[1]); !errors.Is(err, ErrUnknown) || len(revoked) > 0 {
			t.Errorf("revoke %v: %v, %v", tc, revoked, err)
		}
	}
	if revoked, err := c.Revoke(t.Context(), "ci", first.ID); err != nil || !slices.Equal(ids(revoked), []string{first.ID}) {
		t.Fatal(revoked, err)
	}
	c.at = begin.Add(2 * time.Minute)
	if revoked, err := c.Revoke(t.Context(), "ci", ""); err != nil || !slices.Equal(ids(revoked), []string{second.ID}) {
		t.Fatal(revoked, err)
	}
	if revoked, err := c.Revoke(t.Context(), "ci", ""); err != nil || len(revoked) > 0 {
		t.Errorf("revoked again: %v, %v", revoked, err)
	}
	all = list()
	if !all[0].Revoked.IsZero() || !all[1].Revoked.Equal(begin.Add(time.Minute)) || !all[2].Revoked.Equal(begin.Add(2*time.Minute)) {
		t.Errorf("after it: %+v", all)
	}
	// Those that ended long ago are forgotten.
	c.at = first.Ends.Add(keepEnded)
	_, last := c.create(t, Spec{User: "zoe"})
	if got, want := ids(list()), []string{other.ID, second.ID, last.ID}; !slices.Equal(got, want) {
		t.Errorf("listed are %v, want %v", got, want)
	}
}

func TestFollow(t *testing.T) {
	c := newCluster(t)
	anna, listed := c.create(t, Spec{User: "anna"})
	ci, _ := c.create(t, Spec{User: "ci"})
	damaged := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secretPrefix + "bad", Namespace: "kube-system"}, Type: secretType, Data: map[string][]byte{
		keyFingerprint: []byte("f"), keyUser: []byte("bad"), keyEnds: []byte("never"),
	}}
	if err := c.api.Tracker().Add(damaged); err != nil {
		t.Fatal(err)
	}
	if _, err := c.List(t.Context()); err == nil || !strings.Contains(err.Error(), damaged.Name) {
		t.Errorf("a damaged record: %v", err)
	}
	told := make(chan map[string]string, 10)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- c.Follow(ctx, func(m map[string]string) { told <- m }) }()
	defer func() { stop(); <-done }()
	await.True(t, "are the records watched", func() bool {
		return slices.ContainsFunc(c.api.Actions(), func(a k8stesting.Action) bool { return a.GetVerb() == "watch" })
	})
	next := func(want ...*x509.Certificate) {
		t.Helper()
		select {
		case got := <-told:
			if len(got) != len(want) {
				t.Errorf("valid are %d, want %d", len(got), len(want))
			}
			for _, cert := range want {
				f, ours := c.Holder(cert)
				if !ours || got[f] != f {
					t.Errorf("%s is not valid", cert.Subject.CommonName)
				}
			}
		case <-time.After(10 * time.Second):
			t.Fatal("nothing was told")
		}
	}
	next(anna, ci)
	if _, err := c.Revoke(t.Context(), "ci", ""); err != nil {
		t.Fatal(err)
	}
	next(anna)
	// Whoever removes the record has revoked it too.
	if err := c.secrets.Delete(t.Context(), secretPrefix+listed.ID, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	next()
}

// TestRequestIsOnlyAKey: names come from the specification, whatever the request says.
func TestRequestIsOnlyAKey(t *testing.T) {
	c := newCluster(t)
	for _, bad := range [][]byte{nil, []byte("x"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: []byte("x")})} {
		if _, _, err := c.Create(t.Context(), Spec{User: "a", TTL: time.Hour}, bad); !errors.Is(err, pki.ErrRequest) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	all, err := c.List(t.Context())
	if err != nil || len(all) > 0 {
		t.Errorf("recorded are %v, %v", all, err)
	}
}
