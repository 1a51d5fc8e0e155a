package commandline

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
	"kedge/scripts/e2e/harness"
)

// settingsFiles are the configuration of the node of [TestSettingsOfAllPlaces], by name.
func settingsFiles(n *harness.Node) map[string]string {
	return map[string]string{
		"config.yaml": `
node-label: [zone=file, disk=ssd]
node-taint: [file=true:NoSchedule] # the flag wins
kubelet-arg: [max-pods=17]
advertise-address: 192.0.2.101
token-file: ` + filepath.Join(n.Dir, "secret") + `
service-node-port-range: 30000-30100 # the variable wins
log-format: json
disable: [traefik, metrics-server]
`,
		"config.yaml.d/20-later.yaml": "kubelet-arg+: [max-pods=23]\nlog-format: text\n",
		"config.yaml.d/10-site.yaml":  "node-label+:\n- rack=r1\nlog-format: json\n",
		"secret":                      "one-secret-for-all-agents\n",
	}
}

// settingsVariables are its environment.
var settingsVariables = []string{
	"KEDGE_CLUSTER_DNS=10.43.0.53", "KEDGE_NODE_EXTERNAL_IP=203.0.113.7", "KEDGE_WRITE_KUBECONFIG_MODE=0640",
	"KEDGE_SERVICE_NODE_PORT_RANGE=31000-31100", "KEDGE_NODE_TAINT=env=true:NoSchedule",
	"KEDGE_NODE_LABLE=a=b", // a mistake, of which there is a warning
}

// TestSettingsOfAllPlaces starts a server with settings from all places where there may be some, and
// looks at what each of them does. An agent joins with a file.
func TestSettingsOfAllPlaces(t *testing.T) {
	t.Parallel()
	f := settingsHosts(t)
	for name, content := range settingsFiles(f.Node) {
		path := filepath.Join(f.Dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	f.Env = append(os.Environ(), settingsVariables...)
	f.Flags = []string{"--debug", "--node-taint=edge=true:PreferNoSchedule"}
	if err := harness.PrepareImages(f.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}

	st, err := os.Stat(f.Kubeconfig)
	if err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("the kubeconfig has mode %v: %v", st.Mode(), err)
	}
	log := f.Tail(1 << 20)
	for _, want := range []string{"level=DEBUG", `msg="kedge has no traefik, metrics-server; nothing to disable"`, "KEDGE_NODE_LABLE is not a setting of kedge and has no effect; did you mean KEDGE_NODE_LABEL?"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log has no %s", want)
		}
	}
	settingsOfNode(t, f)
	settingsOfCluster(t, f)

	a := f.NewAgentAt(t, f.JoinHost(t), fmt.Sprintf("--server=https://192.0.2.101:%d", f.APIPort), "--token-file="+filepath.Join(f.Dir, "secret"))
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error { return f.NodeIsReady(a.Name) })
}

// settingsHosts joins a server's host of two addresses, not yet started, and an agent's to a switch.
func settingsHosts(t *testing.T) *harness.Fleet {
	host.RequireRoot(t)
	lan, err := host.NewLAN()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lan.Close(); err != nil {
			t.Error(err)
		}
	})
	f := &harness.Fleet{Node: harness.Own(t), LAN: lan, Gate: netip.MustParseAddr("192.0.2.254"), Joined: 1}
	host, err := lan.Host("server", netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("192.0.2.101/24"))
	if err != nil {
		t.Fatal(err)
	}
	if err := host.Route(netip.MustParsePrefix("0.0.0.0/0"), f.Gate); err != nil {
		t.Fatal(err)
	}
	if f.Network, err = namespaces.OpenNetwork(host.Path()); err != nil {
		t.Fatal(err)
	}
	return f
}

// settingsOfNode looks at what the node says of itself.
func settingsOfNode(t *testing.T, f *harness.Fleet) {
	t.Helper()
	object, err := f.Client.CoreV1().Nodes().Get(context.Background(), f.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for key, want := range map[string]string{"zone": "file", "disk": "ssd", "rack": "r1"} {
		if got := object.Labels[key]; got != want {
			t.Errorf("label %s is %q, want %q", key, got, want)
		}
	}
	if want := []corev1.Taint{{Key: "edge", Value: "true", Effect: corev1.TaintEffectPreferNoSchedule}}; !slices.Equal(object.Spec.Taints, want) {
		t.Errorf("taints %v, want %v", object.Spec.Taints, want)
	}
	if got := object.Status.Capacity.Pods().Value(); got != 23 {
		t.Errorf("it takes %d pods, want 23", got)
	}
	addresses := map[corev1.NodeAddressType]string{}
	for _, a := range object.Status.Addresses {
		addresses[a.Type] = a.Address
	}
	if addresses[corev1.NodeExternalIP] != "203.0.113.7" || addresses[corev1.NodeInternalIP] != "192.0.2.1" {
		t.Errorf("addresses %v", addresses)
	}

	version, err := f.Client.Discovery().ServerVersion()
	if err != nil {
		t.Fatal(err)
	}
	info := object.Status.NodeInfo
	if version.GitVersion != info.KubeletVersion {
		t.Errorf("the API is %s and the kubelet %s", version.GitVersion, info.KubeletVersion)
	}
	kubernetes, _, _ := strings.Cut(info.KubeletVersion, "+")
	out, err := f.Run("version")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Kubernetes " + kubernetes, "containerd v" + strings.TrimPrefix(info.ContainerRuntimeVersion, "containerd://")} {
		if !strings.HasPrefix(out, "kedge ") || !strings.Contains(out, "\n"+want+"\n") {
			t.Errorf("kedge version prints no %q: %s", want, out)
		}
	}
}

// settingsOfCluster looks at what others see.
func settingsOfCluster(t *testing.T, f *harness.Fleet) {
	t.Helper()
	ctx := context.Background()
	harness.Eventually(t, 20*time.Second, func() error {
		slices, err := f.Client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=kubernetes"})
		if err != nil {
			return err
		}
		for _, s := range slices.Items {
			if len(s.Endpoints) == 1 && s.Endpoints[0].Addresses[0] == "192.0.2.101" {
				return nil
			}
		}
		return fmt.Errorf("the API's endpoints are %v", slices.Items)
	})
	if out := f.Kedge(t, "token", "create"); !strings.Contains(out, fmt.Sprintf("--server https://192.0.2.101:%d ", f.APIPort)) {
		t.Errorf("others join with %s", out)
	}
	if got := f.AskDNS(t, "10.43.0.53", "kubernetes.default.svc.cluster.local.", dns.TypeA); got != "10.43.0.1" {
		t.Errorf("the cluster's DNS answers the node %q", got)
	}
	ns := f.Namespace(t)
	// Whom a pod asks by itself, and whether it reaches the API that is advertised.
	out := f.RunPod(t, ns, "asks", "grep nameserver /etc/resolv.conf; nslookup kubernetes.default.svc.cluster.local | grep Address; cd /var/run/secrets/kubernetes.io/serviceaccount; probe get https://kubernetes.default.svc/version \"Authorization:Bearer $(cat token)\" ca.crt", "")
	for _, want := range []string{"nameserver 10.43.0.53\n", ": 10.43.0.1\n", "gitVersion"} {
		if !strings.Contains(out, want) {
			t.Errorf("a pod sees no %q: %s", want, out)
		}
	}
	for port, allowed := range map[int32]bool{31050: true, 30050: false} {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{GenerateName: "s-"}, Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80, NodePort: port, TargetPort: intstr.FromInt32(80)}},
		}}
		if _, err := f.Client.CoreV1().Services(ns).Create(ctx, s, metav1.CreateOptions{}); allowed != (err == nil) || err != nil && !apierrors.IsInvalid(err) {
			t.Errorf("node port %d: %v", port, err)
		}
	}
}
