package main

import "fmt"

// controlSettings returns the settings of plain/control. The flags are required for running, or for security;
// none of them is for speed.
func (p *plainNode) controlSettings() any {
	etcd := fmt.Sprintf("http://127.0.0.1:%d", p.port(2))
	return struct {
		EtcdDir, EtcdClient, EtcdPeer, Ready string
		APIServer, Controllers, Scheduler    []string
	}{
		EtcdDir: p.path("etcd"), EtcdClient: etcd, EtcdPeer: fmt.Sprintf("http://127.0.0.1:%d", p.port(3)), Ready: p.url() + "/readyz",
		APIServer: []string{
			"--advertise-address=" + p.ip.String(), "--allow-privileged=true", "--authorization-mode=Node,RBAC",
			"--client-ca-file=" + p.tlsFile("ca.crt"), "--enable-admission-plugins=NodeRestriction",
			"--etcd-servers=" + etcd,
			"--kubelet-certificate-authority=" + p.tlsFile("ca.crt"),
			"--kubelet-client-certificate=" + p.tlsFile("apiserver-kubelet-client.crt"), "--kubelet-client-key=" + p.tlsFile("apiserver-kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname",
			"--proxy-client-cert-file=" + p.tlsFile("front-proxy-client.crt"), "--proxy-client-key-file=" + p.tlsFile("front-proxy-client.key"),
			"--requestheader-allowed-names=front-proxy-client", "--requestheader-client-ca-file=" + p.tlsFile("front-proxy-ca.crt"),
			"--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group", "--requestheader-username-headers=X-Remote-User",
			fmt.Sprint("--secure-port=", p.port(0)),
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + p.tlsFile("sa.key"), "--service-account-signing-key-file=" + p.tlsFile("sa.key"),
			"--service-cluster-ip-range=10.247.0.0/16",
			"--tls-cert-file=" + p.tlsFile("apiserver.crt"), "--tls-private-key-file=" + p.tlsFile("apiserver.key"),
		},
		Controllers: []string{
			"--allocate-node-cidrs=true", "--cluster-cidr=10.246.0.0/16", "--service-cluster-ip-range=10.247.0.0/16",
			"--authentication-kubeconfig=" + p.path("controllers.kubeconfig"), "--authorization-kubeconfig=" + p.path("controllers.kubeconfig"),
			"--kubeconfig=" + p.path("controllers.kubeconfig"), "--bind-address=127.0.0.1", fmt.Sprint("--secure-port=", p.port(4)),
			"--client-ca-file=" + p.tlsFile("ca.crt"), "--root-ca-file=" + p.tlsFile("ca.crt"),
			"--cluster-signing-cert-file=" + p.tlsFile("ca.crt"), "--cluster-signing-key-file=" + p.tlsFile("ca.key"),
			"--requestheader-client-ca-file=" + p.tlsFile("front-proxy-ca.crt"), "--service-account-private-key-file=" + p.tlsFile("sa.key"),
			"--use-service-account-credentials=true", "--leader-elect=false",
		},
		Scheduler: []string{
			"--authentication-kubeconfig=" + p.path("scheduler.kubeconfig"), "--authorization-kubeconfig=" + p.path("scheduler.kubeconfig"),
			"--kubeconfig=" + p.path("scheduler.kubeconfig"), "--bind-address=127.0.0.1", fmt.Sprint("--secure-port=", p.port(5)),
			"--leader-elect=false",
		},
	}
}

// kubeletConfig differs from upstream's defaults in folders, ports and properties of the machine: it does not
// fail because of cgroup v1, swap, or a disk with less than 15 % free, and does not change the host's iptables.
func (p *plainNode) kubeletConfig() string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %[1]s}
authorization: {mode: Webhook}
tlsCertFile: %[2]s
tlsPrivateKeyFile: %[3]s
port: %[4]d
healthzPort: %[5]d
containerRuntimeEndpoint: unix://%[6]s
cgroupDriver: cgroupfs
cgroupRoot: %[7]s
failCgroupV1: false
failSwapOn: false
evictionHard: {memory.available: 100Mi, nodefs.available: 1Gi, imagefs.available: 1Gi}
imageGCHighThresholdPercent: 100
makeIPTablesUtilChains: false
clusterDNS: [10.247.0.10]
clusterDomain: cluster.local
podLogsDir: %[8]s
volumePluginDir: %[9]s
`, p.tlsFile("ca.crt"), p.tlsFile("kubelet-serving.crt"), p.tlsFile("kubelet-serving.key"), p.port(1), p.port(6),
		p.socket(), plainCgroup, p.path("pod-logs"), p.path("volume-plugins"))
}

// containerdConfig differs from the defaults in paths, and if the machine does not allow lowering a process's
// OOM score.
func (p *plainNode) containerdConfig() string {
	return fmt.Sprintf(`version = 3
root = %[1]q
state = %[2]q
[grpc]
  address = %[3]q
[ttrpc]
  address = %[4]q
[plugins.'io.containerd.internal.v1.opt']
  path = %[5]q
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = %[6]q
[plugins.'io.containerd.nri.v1.nri']
  socket_path = %[7]q
  plugin_path = %[8]q
  plugin_config_path = %[8]q
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %[9]q
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = %[10]t
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [%[11]q]
    conf_dir = %[12]q
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = 'io.containerd.runc.v2'
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = %[13]q
      Root = %[14]q
`, p.path("containerd"), p.path("run/c"), p.socket(), p.socket()+".ttrpc", p.path("opt"), p.path("run/s"), p.path("run/nri.sock"), p.path("nri"),
		pauseImage, !mayLowerOOMScore(), p.o.plain, p.path("cni"), p.o.payload+"/runc", p.path("run/runc"))
}

func (p *plainNode) cniConfig() string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0", "name": %q,
  "plugins": [
    {"type": "bridge", "bridge": %q, "isGateway": true, "hairpinMode": true,
     "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.246.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, plainNetwork, plainBridge, p.path("ipam"))
}
