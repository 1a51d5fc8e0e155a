package join

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	k8stesting "k8s.io/client-go/testing"

	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/internal/test/await"
)

// request is one of a connection with the certificate of a file; empty: with none.
func request(t *testing.T, file string) *http.Request {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "https://server/", nil)
	r.TLS = &tls.ConnectionState{}
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := pki.ParseCertificate(file, data)
		if err != nil {
			t.Fatal(err)
		}
		r.TLS.PeerCertificates = []*x509.Certificate{cert}
	}
	return r
}

func TestIdentify(t *testing.T) {
	c := newCluster(t, nil)
	m := c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	other := c.mustJoin(t, t.TempDir(), "b", c.token(t, Spec{}))
	node, key, err := c.Identify(request(t, m.ClientCertFile()))
	if err != nil || node != "a" || key == "" {
		t.Fatalf("the node is %q with key %q, %v", node, key, err)
	}
	if _, another, err := c.Identify(request(t, other.ClientCertFile())); err != nil || another == key {
		t.Errorf("another node has the key %q, %v", another, err)
	}
	// Signed by the cluster, for the name, but not for the key that has it.
	forged := func(ca *pki.Authority, name string, groups ...string) string {
		t.Helper()
		p, err := ca.EnsureLeaf(t.TempDir(), "x", pki.Leaf{CommonName: joining.NodeUser(name), Organizations: groups, Client: true}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return p.CertFile
	}
	stranger, err := pki.EnsureAuthority(t.TempDir(), "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for what, w := range map[string]struct {
		file string
		want error
	}{
		"no certificate":              {"", errRequest},
		"the network's":               {m.NetworkCertFile(), errCertificate},
		"the kubelet's as a server":   {m.ServingCertFile(), errCertificate},
		"of another authority":        {forged(stranger, "a", nodesGroup), errCertificate},
		"not in the group of nodes":   {forged(c.cfg.ClientCA, "a"), errCertificate},
		"with another key":            {forged(c.cfg.ClientCA, "a", nodesGroup), ErrNameTaken},
		"of a node that nobody knows": {forged(c.cfg.ClientCA, "c", nodesGroup), ErrUnknownNode},
		"of a name that is none":      {forged(c.cfg.ClientCA, "../a", nodesGroup), ErrBadName},
	} {
		if node, _, err := c.Identify(request(t, w.file)); !errors.Is(err, w.want) {
			t.Errorf("%s: %q, %v", what, node, err)
		}
	}
	c.now = func() time.Time { return time.Now().Add(Life + time.Hour) }
	if _, _, err := c.Identify(request(t, m.ClientCertFile())); !errors.Is(err, errCertificate) {
		t.Errorf("expired: %v", err)
	}
}

// Who fails too often is not asked why any more, and who does not is let in still.
func TestIdentifyIsLimited(t *testing.T) {
	c := newCluster(t, nil)
	m := c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	for range burst {
		_, _, _ = c.Identify(request(t, ""))
	}
	if _, _, err := c.Identify(request(t, "")); !errors.Is(err, errTooMany) {
		t.Errorf("after %d attempts: %v", burst, err)
	}
	if _, _, err := c.Identify(request(t, m.ClientCertFile())); err != nil {
		t.Errorf("a node of the same address: %v", err)
	}
}

func TestFollowKeys(t *testing.T) {
	c := newCluster(t, nil)
	c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	ctx, cancel := context.WithCancel(t.Context())
	told := make(chan map[string]string)
	done := make(chan error, 1)
	go func() {
		done <- c.Nodes().Follow(ctx, func(keys map[string]string) {
			select {
			case told <- keys:
			case <-ctx.Done():
			}
		})
	}()
	first := <-told
	if len(first) != 1 || first["a"] == "" {
		t.Fatalf("the keys are %v", first)
	}
	// Again and again: the client of this test forgets what changes between a list and
	// a watch.
	await.True(t, "a changed key is told", func() bool {
		if err := c.Nodes().Set(t.Context(), "a", fmt.Sprint("another-", time.Now().UnixNano())); err != nil {
			t.Fatal(err)
		}
		select {
		case keys := <-told:
			return strings.HasPrefix(keys["a"], "another-") && len(keys) == 1
		case <-time.After(10 * time.Millisecond):
			return false
		}
	})
	cancel()
	<-done
}

// Failures are refused before the work that they cause, and successes cost nothing.
func TestIdentifyIsBounded(t *testing.T) {
	c := newCluster(t, nil)
	m := c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	good := request(t, m.ClientCertFile())
	for range 3 * burst {
		if _, _, err := c.Identify(good); err != nil {
			t.Fatal(err)
		}
	}
	stranger, err := pki.EnsureAuthority(t.TempDir(), "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	p, err := stranger.EnsureLeaf(t.TempDir(), "x", pki.Leaf{CommonName: joining.NodeUser("a"), Organizations: []string{nodesGroup}, Client: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	bad := request(t, p.CertFile)
	for range burst {
		if _, _, err := c.Identify(bad); !errors.Is(err, errCertificate) {
			t.Fatal(err)
		}
	}
	asked := 0
	c.api.PrependReactor("get", "secrets", func(k8stesting.Action) (bool, runtime.Object, error) {
		asked++
		return false, nil, nil
	})
	if _, _, err := c.Identify(bad); !errors.Is(err, errTooMany) || asked > 0 {
		t.Errorf("after %d failures: %v, and the API was asked %d times", burst, err, asked)
	}
	if _, _, err := c.Identify(good); err != nil {
		t.Errorf("a node is locked out by others of its address: %v", err)
	}
}
