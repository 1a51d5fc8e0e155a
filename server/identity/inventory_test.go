package identity

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/internal/errorkind"
	"kedge/internal/pki"
)

// prepared is a server's directory.
func prepared(t *testing.T, now time.Time) (Config, *Identity) {
	t.Helper()
	address := netip.MustParseAddr("192.0.2.1")
	cfg := Config{
		Dir: t.TempDir(), NodeName: "s1", HTTPSPort: 6443, AdvertiseAddress: address, NodeIPs: []netip.Addr{address},
		ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local",
		Kubeconfig: filepath.Join(t.TempDir(), "kubeconfig"), KubeconfigMode: 0o600, KubeconfigName: "default",
	}
	id, err := Prepare(cfg, now)
	if err != nil {
		t.Fatal(err)
	}
	return cfg, id
}

// files returns the content of all files with certificates and keys, by name.
func files(t *testing.T, cfg Config) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, pattern := range []string{filepath.Join(cfg.tlsDir(), "*"), cfg.Kubeconfig} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range found {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			all[filepath.Base(path)] = string(data)
		}
	}
	return all
}

// TestCertificatesAreAll: no certificate is missing in the list.
func TestCertificatesAreAll(t *testing.T) {
	cfg, _ := prepared(t, time.Now())
	listed := map[string]bool{}
	for _, c := range Certificates(cfg.Dir, cfg.Kubeconfig, time.Now()) {
		listed[filepath.Base(c.File)] = true
		if c.Problem != "" || len(c.Names) == 0 || c.Authority == "" || c.Ends.IsZero() || c.UsedBy == "" || c.CA != slices.Contains(authorities, c.Name) {
			t.Errorf("a good certificate is %+v", c)
		}
	}
	for name := range files(t, cfg) {
		if filepath.Ext(name) != ".key" && name != podsCA && !listed[name] { // pods-ca.crt is for others, and made from two of these
			t.Errorf("%s is not listed", name)
		}
	}
}

func TestProblemsOfCertificates(t *testing.T) {
	now := time.Now()
	for name, tc := range map[string]struct {
		at   time.Time
		hurt func(tls string) error
		want map[string]string // problems by name
	}{
		"a missing file": {now, func(tls string) error { return os.Remove(filepath.Join(tls, "peer.crt")) }, map[string]string{"peer": "it is missing"}},
		"a damaged file": {now, func(tls string) error { return os.Truncate(filepath.Join(tls, "peer.crt"), 9) }, map[string]string{"peer": "cannot be read as a certificate"}},
		"a lost key":     {now, func(tls string) error { return os.Remove(filepath.Join(tls, "peer.key")) }, map[string]string{"peer": "peer.key is missing"}},
		"another's key": {now, func(tls string) error {
			return os.Rename(filepath.Join(tls, "client-admin.key"), filepath.Join(tls, "peer.key"))
		}, map[string]string{"peer": "does not fit its key", "client-admin": "client-admin.key is missing"}},
		"another's authority": {now, func(tls string) error {
			return os.Rename(filepath.Join(tls, "server-ca.crt"), filepath.Join(tls, "peer-ca.crt"))
		}, map[string]string{
			"peer": "has not signed it", "peer-ca": "does not fit its key", "server-ca": "it is missing", "serving-kube-apiserver": "its authority",
		}},
		"soon": {now.Add(pki.LeafLife * 6 / 7), func(string) error { return nil }, map[string]string{
			"serving-kube-apiserver": "was not renewed", "client-kube-apiserver": "was not renewed", "client-auth-proxy": "was not renewed", "client-admin": "was not renewed",
			"serving-kubelet": "was not renewed", "client-node": "was not renewed", "peer": "was not renewed", "kubeconfig": "was not renewed",
		}},
		"in time": {now.Add(pki.LeafLife * 2 / 3), func(string) error { return nil }, nil},
		"late": {now.Add(pki.LeafLife * 2), func(string) error { return nil }, map[string]string{
			"serving-kube-apiserver": "it has ended", "client-kube-apiserver": "it has ended", "client-auth-proxy": "it has ended", "client-admin": "it has ended",
			"serving-kubelet": "it has ended", "client-node": "it has ended", "peer": "it has ended", "kubeconfig": "it has ended",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cfg, _ := prepared(t, now)
			if err := tc.hurt(cfg.tlsDir()); err != nil {
				t.Fatal(err)
			}
			for _, c := range Certificates(cfg.Dir, cfg.Kubeconfig, tc.at) {
				if want := tc.want[c.Name]; want == "" && c.Problem != "" || !strings.Contains(c.Problem, want) {
					t.Errorf("%s: %q, want %q", c.Name, c.Problem, want)
				}
			}
		})
	}
}

// TestRotate: new certificates, with new keys except the node's, are good for the next start too.
func TestRotate(t *testing.T) {
	now := time.Now()
	for name, rotate := range map[string]func(Config, *Identity, []string) ([]string, error){
		"running": func(cfg Config, id *Identity, names []string) ([]string, error) {
			return NewRenewal(cfg, id, slog.New(slog.DiscardHandler)).Rotate(names, now)
		},
		"stopped": func(cfg Config, _ *Identity, names []string) ([]string, error) { return Rotate(cfg.Dir, names, now) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg, id := prepared(t, now)
			before := files(t, cfg)
			changed := func() (all []string) {
				for name, data := range files(t, cfg) {
					if before[name] != data && name != podsCA {
						all = append(all, name)
					}
				}
				slices.Sort(all)
				return all
			}
			for _, bad := range []string{"server-ca", "kubeconfig", "nothing"} {
				if _, err := rotate(cfg, id, []string{"peer", bad}); errorkind.ExitCode(err) != errorkind.ExitUsage {
					t.Errorf("%s: %v", bad, err)
				}
			}
			if rotated, err := rotate(cfg, id, []string{"peer"}); err != nil || !slices.Equal(rotated, []string{"peer"}) {
				t.Fatal(rotated, err)
			}
			if got, want := changed(), []string{"peer.crt", "peer.key"}; !slices.Equal(got, want) {
				t.Errorf("changed are %v, want %v", got, want)
			}
			if rotated, err := rotate(cfg, id, nil); err != nil || len(rotated) != len(leafFiles) {
				t.Fatal(rotated, err)
			}
			want := []string{
				"client-admin.crt", "client-admin.key", "client-auth-proxy.crt", "client-auth-proxy.key", "client-kube-apiserver.crt", "client-kube-apiserver.key",
				"client-node.crt", "peer.crt", "peer.key", "serving-kube-apiserver.crt", "serving-kube-apiserver.key", "serving-kubelet.crt",
			}
			if name == "running" {
				want = append(want, "kubeconfig")
				slices.Sort(want)
			}
			if got := changed(); !slices.Equal(got, want) {
				t.Errorf("changed are %v, want %v", got, want)
			}
			rotatedFiles := files(t, cfg)
			cfg.Established = true
			if _, err := Prepare(cfg, now); err != nil {
				t.Fatal(err)
			}
			for name, data := range files(t, cfg) {
				if rotatedFiles[name] != data && name != "client-node.crt" && name != "kubeconfig" && name != podsCA {
					t.Errorf("the next start has made another %s", name)
				}
			}
			for _, c := range Certificates(cfg.Dir, cfg.Kubeconfig, now) {
				if c.Problem != "" {
					t.Errorf("%s: %s", c.Name, c.Problem)
				}
			}
		})
	}
}
