package arguments

import (
	"os"
	"slices"
	"strings"
	"testing"

	"kedge/internal/componentflags"
)

func TestAPIServer(t *testing.T) {
	defaults := map[string]string{
		"authorization-mode":               "Node,RBAC",
		"enable-admission-plugins":         "NodeRestriction",
		"service-account-key-file":         "ours",
		"service-account-signing-key-file": "ours",
	}
	const (
		mode, plugins = "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"
		key, signs    = "--service-account-key-file=ours", "--service-account-signing-key-file=ours"
	)
	for _, tc := range []struct {
		name       string
		user, want []string
	}{
		{"nothing", nil, []string{mode, plugins, key, signs}},
		{"plug-ins are added", []string{"enable-admission-plugins=AlwaysPullImages"}, []string{mode, key, signs, plugins, "--enable-admission-plugins=AlwaysPullImages"}},
		{"and taken away", []string{"disable-admission-plugins=Priority, NodeRestriction"}, []string{mode, key, signs, "--disable-admission-plugins=Priority, NodeRestriction"}},
		{"but those that are named only", []string{"disable-admission-plugins=Priority"}, []string{mode, plugins, key, signs, "--disable-admission-plugins=Priority"}},
		{"the old list of plug-ins", []string{"--admission-control=Priority"}, []string{mode, key, signs, "--admission-control=NodeRestriction", "--admission-control=Priority"}},
		{"a file of authorizers", []string{"authorization-config=f"}, []string{plugins, key, signs, "--authorization-config=f"}},
		{"other modes", []string{"authorization-mode=RBAC"}, []string{plugins, key, signs, "--authorization-mode=RBAC"}},
		{"more keys", []string{"service-account-key-file=a", "service-account-key-file=b"}, []string{mode, plugins, signs, key, "--service-account-key-file=a", "--service-account-key-file=b"}},
		{"a signer outside", []string{"service-account-signing-endpoint=s"}, []string{mode, plugins, "--service-account-signing-endpoint=s"}},
	} {
		got, err := APIServer(defaults, tc.user)
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, %v; want %q", tc.name, got, err, tc.want)
		}
	}
	if len(defaults) != 4 {
		t.Error("the defaults were changed")
	}
}

func TestControllers(t *testing.T) {
	defaults := map[string]string{"cluster-signing-kubelet-client-cert-file": "c", "cluster-signing-kubelet-client-key-file": "k", "profiling": "false"}
	const own = "--cluster-signing-kubelet-client-key-file=k"
	for _, tc := range []struct{ user, want []string }{
		{[]string{"cluster-signing-cert-file=x", "cluster-signing-key-file=y"}, []string{"--profiling=false", "--cluster-signing-cert-file=x", "--cluster-signing-key-file=y"}},
		{[]string{"cluster-signing-kubelet-client-cert-file=x"}, []string{own, "--profiling=false", "--cluster-signing-kubelet-client-cert-file=x"}},
		{[]string{"cluster-signing-duration=1h"}, []string{"--cluster-signing-kubelet-client-cert-file=c", own, "--profiling=false", "--cluster-signing-duration=1h"}},
	} {
		got, err := Controllers(defaults, tc.user)
		if err != nil || !slices.Equal(got, tc.want) {
			t.Errorf("%q makes %q, %v; want %q", tc.user, got, err, tc.want)
		}
	}
}

func TestCheck(t *testing.T) {
	good := []string{"v=4", "vmodule=x=2", "feature-gates=A=true"}
	if err := Check(append(good, "oidc-issuer-url=x", "authentication-config=f", "service-account-issuer=x", "etcd-compaction-interval=1m"), append(good, "concurrent-job-syncs=3", "secure-port=10257"), append(good, "config=f")); err != nil {
		t.Errorf("what users may give was refused: %v", err)
	}
	err := Check([]string{"--secure-port=1", "logging-format=json"}, []string{"leader-elect", "cluster_cidr=x"}, []string{"kube-api-qps=3", "log-text-split-stream"})
	const want = `--kube-apiserver-arg: secure-port cannot be set: use --https-listen-port
--kube-apiserver-arg: logging-format cannot be set: the log has one form for all parts; use --log-format
--kube-controller-manager-arg: leader-elect cannot be set: the leader of the datastore leads the cluster; leave it out
--kube-controller-manager-arg: cluster_cidr cannot be set: use --cluster-cidr
--kube-scheduler-arg: kube-api-qps cannot be set: kedge's own components call the API without limits of their own; leave it out
--kube-scheduler-arg: log-text-split-stream cannot be set: the log has one form for all parts; use --log-format`
	if err == nil || err.Error() != want {
		t.Errorf("these are refused:\n%v\nwant\n%s", err, want)
	}
}

func TestSaysWhoIsAnonymous(t *testing.T) {
	const head = "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthenticationConfiguration\n"
	for file, want := range map[string]bool{
		head:                                   false,
		head + "jwt: []\n":                     false,
		head + "anonymous:\n":                  false, // upstream takes it for nothing said, too
		head + "anonymous: {enabled: false}\n": true,
		head + "anonymous: {enabled: true, conditions: [{path: /livez}]}\n": true,
		`{"anonymous": {}}`: true,
	} {
		if got, err := SaysWhoIsAnonymous([]byte(file)); err != nil || got != want {
			t.Errorf("%s: %v, %v", file, got, err)
		}
	}
	if _, err := SaysWhoIsAnonymous([]byte("\t")); err == nil || !strings.HasPrefix(err.Error(), "--kube-apiserver-arg: authentication-config: ") {
		t.Errorf("what is no YAML: %v", err)
	}
}

// The page for users names all that they cannot give.
func TestPageNamesDecided(t *testing.T) {
	page, err := os.ReadFile("../../docs/component-arguments.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, some := range []componentflags.Decided{apiServer, controllers, scheduler, componentflags.Logging, componentflags.Clients} {
		for name := range some {
			if shown := strings.Replace(name, "elect*", "elect", 1); !strings.Contains(string(page), "`"+shown+"`") {
				t.Errorf("docs/component-arguments.md lacks %s: name it in the table", name)
			}
		}
	}
}
