package settings

import "strings"

// OnlyK3s returns the advice for a flag of k3s that kedge does not have. Users of k3s often reuse its
// configuration.
func OnlyK3s(name string) (why string, ok bool) {
	for _, f := range k3sFlags {
		for _, n := range f.names {
			if name == n || strings.HasSuffix(n, "*") && strings.HasPrefix(name, strings.TrimSuffix(n, "*")) {
				return f.why, true
			}
		}
	}
	return "", false
}

// k3sFlags are flags of "k3s server" and "k3s agent" (k3s 1.33). A name that ends with * stands for all flags
// with this prefix.
var k3sFlags = []struct {
	why   string
	names []string
}{
	{"the only external datastore that kedge supports is etcd; leave it out", []string{"kine-tls"}},
	{"other servers can always join the first server; leave it out", []string{"cluster-init"}},
	{"use \"kedge snapshot restore\"; kedge has no command yet that resets a cluster of several servers to one", []string{"cluster-reset"}},
	{"use \"kedge snapshot restore\" for a snapshot of kedge, and \"kedge import k3s\" for the objects in one of k3s", []string{"cluster-reset-restore-path"}},
	{"kedge has --snapshot-schedule, --snapshot-retention and --snapshot-dir for it", []string{"etcd-snapshot*"}},
	{"use --snapshot-schedule=off", []string{"etcd-disable-snapshots"}},
	{"kedge has the same without etcd-: --s3, --s3-bucket and so on", []string{"etcd-s3*"}},
	{"kedge configures the embedded datastore, which has no flags; leave it out", []string{"etcd-arg", "etcd-expose-metrics", "disable-etcd"}},
	{"--token is for agents only already, and --server-token for servers", []string{"agent-token", "agent-token-file"}},
	{"Secrets are always encrypted at rest; leave it out", []string{"secrets-encryption", "secrets-encryption-provider"}},
	{"containerd is embedded and the only container runtime; leave it out", []string{"docker", "container-runtime-endpoint", "image-service-endpoint", "default-runtime", "disable-default-registry-endpoint", "nonroot-devices"}},
	{"the pause image is kedge's own; leave it out", []string{"pause-image", "system-default-registry", "airgap-extra-registry"}},
	{"kedge has no volume provisioner yet", []string{"default-local-storage-path"}},
	{"kedge deploys no charts; leave it out", []string{"disable-helm-controller", "helm-job-image"}},
	{"a cloud controller manager needs --kubelet-arg=cloud-provider=external only; leave it out", []string{"disable-cloud-controller", "kube-cloud-controller-manager-arg"}},
	{"a server always runs the whole control plane; leave it out", []string{"disable-scheduler", "disable-apiserver", "disable-controller-manager"}},
	{"servers always reach nodes through connections that the nodes open; leave it out", []string{"egress-selector-mode", "lb-server-port"}},
	{"kedge has its own implementation of services; see --proxy-scheduler and --nodeport-addresses", []string{"kube-proxy-arg"}},
	{"nodes do not share images; leave it out", []string{"embedded-registry"}},
	{"the network has no configuration file of its own; see --flannel-backend and --flannel-iface", []string{"flannel-conf", "flannel-cni-conf", "flannel-ipv6-masq", "multi-cluster-cidr", "vpn-auth", "vpn-auth-file"}},
	{"kedge runs as root only; leave it out", []string{"rootless"}},
	{"kedge does not configure SELinux", []string{"selinux"}},
	{"a node's name is bound to its key, so it needs no suffix; leave it out", []string{"with-node-id"}},
	{"use --log-level", []string{"v", "vmodule"}},
	{"with --log kedge logs to a file only; leave it out", []string{"alsologtostderr"}},
	{"root can read profiles on the control socket in the run directory; leave it out", []string{"enable-pprof", "supervisor-metrics"}},
	{"the load balancer does not run pods; leave it out", []string{"servicelb-namespace"}},
	{"use --node-name and --tls-san", []string{"node-internal-dns", "node-external-dns"}},
	{"use --kubelet-arg=protect-kernel-defaults=true", []string{"protect-kernel-defaults"}},
	{"the kubeconfig belongs to root; \"kedge kubeconfig create\" makes others", []string{"write-kubeconfig-group"}},
	{"only --tls-san adds names to the API's certificate; leave it out", []string{"tls-san-security"}},
	{"kedge does not use programs of the host; leave it out", []string{"prefer-bundled-bin"}},
}
