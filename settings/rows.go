package settings

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	utilnet "k8s.io/apimachinery/pkg/util/net"

	"kedge/internal/joining"
	"kedge/internal/logging"
)

// Default paths.
const (
	DefaultConfigFile = "/etc/kedge/config.yaml"
	DefaultKubeconfig = "/etc/kedge/kedge.yaml"
)

// LauncherVariable is the environment variable in which the launcher passes its own path. It is not a setting.
const LauncherVariable = "KEDGE_LAUNCHER"

// StartedByVariable is the environment variable in which the launcher passes the path of the launcher that was started, if
// that one has chosen another for the trial of an upgrade. It is not a setting.
const StartedByVariable = "KEDGE_STARTED_BY"

// The settings of servers and agents, in the order of help and reference.
var (
	Config = row(NotEmpty(Setting{Name: "config", Short: "c", Category: General, Roles: Both, Default: DefaultConfigFile, NoKey: true,
		Help: "Configuration `FILE`; files in FILE.d are read after it"}))
	DataDir = row(NotEmpty(Setting{Name: "data-dir", Short: "d", Category: General, Roles: Both, Default: "/var/lib/kedge",
		Help: "`DIR` for persistent data"}))
	RunDir = row(NotEmpty(Setting{Name: "run-dir", Category: General, Roles: Both, Default: "/run/kedge",
		Help: "Folder for sockets and other data that need not survive a reboot"}))
	LogLevel = row(Value(Setting{Name: "log-level", Category: General, Roles: Both, Default: "info",
		Help: "`LEVEL`: trace, debug, info, warn or error"}, logLevel))
	LogFormat = row(OneOf(Setting{Name: "log-format", Category: General, Roles: Both, Default: string(logging.Text),
		Help: "`FORMAT`: text or json"}, []string{string(logging.Text), string(logging.JSON)}))
	Log = row(Text(Setting{Name: "log", Short: "l", Category: General, Roles: Both,
		Help: "`FILE` for the log, which kedge rotates (default: the standard error output)"}))
	Debug = row(Switch(Setting{Name: "debug", Category: General, Roles: Both,
		Help: "The same as --log-level=debug"}))
	DisableAgent = row(Switch(Setting{Name: "disable-agent", Category: General, Roles: Server,
		Help: "Run only the control plane, without a node"}))
	Disable = row(clusterWide(List(Setting{Name: "disable", Category: General, Roles: Server,
		Help: "Component to leave out: dns or servicelb (can be repeated); components that only k3s has cause a warning"}, parseComponent), putDisabled, nil))

	NodeName = row(Value(Setting{Name: "node-name", Category: Node, Roles: Both,
		Help: "`NAME` of the node (default: the hostname)"}, nodeName))
	NodeLabels = row(Texts(Setting{Name: "node-label", Category: Node, Roles: Both,
		Help: "`KEY=VALUE` to register the node with (can be repeated)"}))
	NodeTaints = row(Texts(Setting{Name: "node-taint", Category: Node, Roles: Both,
		Help: "`KEY=VALUE:EFFECT` to register the node with (can be repeated)"}))
	NodeIPs = row(onePerFamily(Addresses(Setting{Name: "node-ip", Short: "i", Category: Node, Roles: Both,
		Help: "`ADDRESS` of the node, at most one IPv4 and one IPv6 (default: that of the default route)"})))
	NodeExternalIPs = row(onePerFamily(Addresses(Setting{Name: "node-external-ip", Category: Node, Roles: Both,
		Help: "`ADDRESS` by which others reach the node from outside of its network, at most one IPv4 and one IPv6"})))
	HostPaths = row(Switch(Setting{Name: "host-paths", Category: Node, Roles: Both,
		Help: "Keep volumes and logs in the folders that CSI drivers and log collectors expect: /var/lib/kubelet, /var/log/pods, /var/log/containers"}))
	ResolvConf = row(Text(Setting{Name: "resolv-conf", Category: Node, Roles: Both,
		Help: "`FILE` with the name servers for names outside of the cluster, and for pods with dnsPolicy Default (default: the host's)"}))
	KubeletPort = row(Port(Setting{Name: "kubelet-port", Category: Node, Roles: Both, Default: "10250",
		Help: "`PORT` of the kubelet"}))
	Snapshotter = row(OneOf(Setting{Name: "snapshotter", Category: Node, Roles: Both,
		Help: "Snapshotter for image layers: overlayfs or native (default: overlayfs where it works)"}, []string{"overlayfs", "native"}))
	PrivateRegistry = row(Text(Setting{Name: "private-registry", Category: Node, Roles: Both, Default: "/etc/kedge/registries.yaml",
		Help: "`FILE` with registry mirrors and credentials"}))

	ClusterCIDRs = row(clusterWide(Ranges(Setting{Name: "cluster-cidr", Category: Network, Roles: Server,
		Help: "`RANGE` of pod addresses, one of each family (default: " + defaultClusterCIDR + ")"}),
		func(c *joining.Cluster, v []netip.Prefix) { c.ClusterCIDRs = v }, func(c joining.Cluster) any { return c.ClusterCIDRs }))
	ServiceCIDRs = row(clusterWide(Ranges(Setting{Name: "service-cidr", Category: Network, Roles: Server,
		Help: "`RANGE` of service addresses, one of each family (default: " + defaultServiceCIDR + ")"}),
		func(c *joining.Cluster, v []netip.Prefix) { c.ServiceCIDRs = v }, func(c joining.Cluster) any { return c.ServiceCIDRs }))
	ClusterDNS = row(clusterWide(Addresses(Setting{Name: "cluster-dns", Category: Network, Roles: Server,
		Help: "`ADDRESS` of the cluster's DNS (default: the tenth of the service range)"}),
		func(c *joining.Cluster, v []netip.Addr) { c.ClusterDNS = v }, func(c joining.Cluster) any { return c.ClusterDNS }))
	ClusterDomain = row(clusterWide(Text(Setting{Name: "cluster-domain", Category: Network, Roles: Server, Default: "cluster.local",
		Help: "`DOMAIN` of the cluster"}),
		func(c *joining.Cluster, v string) { c.ClusterDomain = v }, func(c joining.Cluster) any { return c.ClusterDomain }))
	LBPools = row(clusterWide(Texts(Setting{Name: "lb-pool", Category: Network, Roles: Server,
		Help: "`[NAME=]RANGE` of addresses for services of type LoadBalancer, instead of the nodes' addresses (can be repeated)"}),
		func(c *joining.Cluster, v []string) { c.Pools = v }, func(c joining.Cluster) any { return c.Pools }))
	FlannelBackend = row(clusterWide(OneOf(Setting{Name: "flannel-backend", Category: Network, Roles: Server, Default: "vxlan",
		Help: "`BACKEND` for traffic between pods of different nodes, equal on all nodes: vxlan, wireguard, host-gw, udp or none (for another CNI plugin)"},
		[]string{"vxlan", "host-gw", "wireguard", "udp", "none"}, wireGuardOfK3s),
		func(c *joining.Cluster, v string) { c.Backend = strings.Replace(v, wireGuardOfK3s, "wireguard", 1) }, func(c joining.Cluster) any { return c.Backend }))
	FlannelIface = row(Text(Setting{Name: "flannel-iface", Category: Network, Roles: Both,
		Help: "`INTERFACE` with the addresses for traffic between nodes, which are also the default of --node-ip (default: the default route's)"}))
	FlannelExternalIP = row(clusterWide(Switch(Setting{Name: "flannel-external-ip", Category: Network, Roles: Server,
		Help: "Send traffic for pods of other nodes to the --node-external-ip of those nodes"}),
		func(c *joining.Cluster, v bool) { c.External = v }, func(c joining.Cluster) any { return c.External }))
	DisableNetworkPolicy = row(clusterWide(Switch(Setting{Name: "disable-network-policy", Category: Network, Roles: Server,
		Help: "Do not enforce network policies"}),
		func(c *joining.Cluster, v bool) { c.NoPolicy = v }, func(c joining.Cluster) any { return c.NoPolicy }))
	NodePortRange = row(Value(Setting{Name: "service-node-port-range", Category: Network, Roles: Server, Default: "30000-32767",
		Help: "`RANGE` of node ports"}, portRange))
	NodePortAddresses = row(List(Setting{Name: "nodeport-addresses", Category: Network, Roles: Both,
		Help: "`RANGE` of node addresses at which node ports answer, or \"primary\" for the node's own (default: primary)"}, nodePortAddress))
	ProxyScheduler = row(Text(Setting{Name: "proxy-scheduler", Category: Network, Roles: Both, Default: "random",
		Help: "`SCHEDULER` that chooses an endpoint of a service: random, round-robin or source-hash"}))
	DisableKubeProxy = row(clusterWide(Switch(Setting{Name: "disable-kube-proxy", Category: Network, Roles: Server,
		Help: "Leave services to another proxy"}),
		func(c *joining.Cluster, v bool) { c.NoProxy = v }, func(c joining.Cluster) any { return c.NoProxy }))

	BindAddress = row(Address(Setting{Name: "bind-address", Category: API, Roles: Server,
		Help: "`ADDRESS` on which the API listens (default: all)"}))
	HTTPSPort = row(Port(Setting{Name: "https-listen-port", Category: API, Roles: Server, Default: "6443",
		Help: "`PORT` of the API"}))
	AdvertiseAddress = row(Address(Setting{Name: "advertise-address", Category: API, Roles: Server,
		Help: "`ADDRESS` at which other machines reach the API (default: the node's)"}))
	TLSSANs = row(Texts(Setting{Name: "tls-san", Category: API, Roles: Server,
		Help: "Additional name or address for the API's certificate (can be repeated)"}))
	Kubeconfig = row(NotEmpty(Setting{Name: "write-kubeconfig", Short: "o", Category: API, Roles: Server, Default: DefaultKubeconfig,
		Help: "`FILE` for the administrator's kubeconfig"}))
	KubeconfigMode = row(FileMode(Setting{Name: "write-kubeconfig-mode", Category: API, Roles: Server, Default: "600",
		Help: "`MODE` of that file, octal"}))
	KubeconfigName = row(NotEmpty(Setting{Name: "write-kubeconfig-name", Category: API, Roles: Server, Default: "default",
		Help: "`NAME` of the cluster, the context and the user in that file"}))
	PeerPort = row(Port(Setting{Name: "peer-port", Category: API, Roles: Server, Default: "2380",
		Help: "`PORT` for connections between the datastores of several servers"}))

	DatastoreEndpoints = row(Texts(Setting{Name: "datastore-endpoint", Category: Datastore, Roles: Server,
		Help: "`URL` of a member of an etcd that keeps the cluster's objects, in place of kedge's own datastore: https://HOST:2379, http://HOST:2379 or unix:///PATH (can be repeated)"}))
	DatastoreCA = row(Text(Setting{Name: "datastore-cafile", Category: Datastore, Roles: Server,
		Help: "`FILE` with the authority of that etcd's certificates (default: the system's authorities)"}))
	DatastoreCert = row(Text(Setting{Name: "datastore-certfile", Category: Datastore, Roles: Server,
		Help: "`FILE` with the certificate with which this server logs in to that etcd"}))
	DatastoreKey = row(Text(Setting{Name: "datastore-keyfile", Category: Datastore, Roles: Server,
		Help: "`FILE` with the key of that certificate"}))

	JoinServer = row(Value(Setting{Name: "server", Short: "s", Category: Joining, Roles: Both,
		Help: "`URL` of a server of the cluster to join, such as https://HOST:6443"}, serverURL))
	Token = row(Text(Setting{Name: "token", Short: "t", Category: Joining, Roles: Both, File: "token-file",
		Help:    "With --server, the `TOKEN` for joining, from \"kedge token create\"; needed only at the first start. Without --server, a secret of at least 16 characters with which agents can join at any time",
		HelpFor: map[Role]string{Agent: "`TOKEN` for joining, from \"kedge token create\"; needed only at the first start"}}))
	ServerToken = row(Text(Setting{Name: "server-token", Category: Joining, Roles: Server,
		Help: "Secret of at least 16 characters with which servers can join at any time, and get all of a server's secrets; tokens of \"kedge token create --role server\" are safer"}))
	Witness = row(Switch(Setting{Name: "witness", Category: Joining, Roles: Server,
		Help: "Join as a witness, which votes and keeps a copy of the datastore, and runs nothing else: the third machine beside two servers"}))
	AgentCertificateLife = row(Duration(Setting{Name: "agent-certificate-life", Category: Joining, Roles: Server, Default: "720h0m0s",
		Help: "`TIME` for which the certificates that this server signs for agents are valid; they are renewed after half of it"}))
	TokenFile = row(Text(Setting{Name: "token-file", Category: Joining, Roles: Both,
		Help: "`FILE` with the token"}))

	SnapshotDir = row(Value(Setting{Name: "snapshot-dir", Category: Snapshots, Roles: Server,
		Help: "`DIR` for snapshots of the cluster, an absolute path (default: snapshots in the data directory)"}, absolutePath))
	SnapshotSchedule = row(Text(Setting{Name: "snapshot-schedule", Category: Snapshots, Roles: Server, Default: "H */12 * * *",
		Help: "`SCHEDULE` of snapshots, as cron has it, or off; H instead of the minute is one that differs between servers"}))
	SnapshotRetention = row(Value(Setting{Name: "snapshot-retention", Category: Snapshots, Roles: Server, Default: "5",
		Help: "`NUMBER` of scheduled snapshots to keep on this server"}, retention))

	S3 = row(Switch(Setting{Name: "s3", Category: Snapshots, Roles: Server,
		Help: "Store snapshots in S3 too"}))
	S3Endpoint = row(Text(Setting{Name: "s3-endpoint", Category: Snapshots, Roles: Server, Default: "s3.amazonaws.com",
		Help: "`HOST` or HOST:PORT of the S3 server"}))
	S3Bucket = row(Text(Setting{Name: "s3-bucket", Category: Snapshots, Roles: Server,
		Help: "`NAME` of the bucket, which must exist"}))
	S3Folder = row(Text(Setting{Name: "s3-folder", Category: Snapshots, Roles: Server,
		Help: "`FOLDER` in the bucket"}))
	S3Region = row(Text(Setting{Name: "s3-region", Category: Snapshots, Roles: Server, Default: "us-east-1",
		Help: "`REGION` of the bucket"}))
	S3AccessKey = row(Text(Setting{Name: "s3-access-key", Category: Snapshots, Roles: Server,
		Help: "Access `KEY` of S3"}))
	S3SecretKey = row(Text(Setting{Name: "s3-secret-key", Category: Snapshots, Roles: Server,
		Help: "Secret `KEY` of S3; better in the configuration file or the variable, since others see the command line"}))
	S3SkipVerify = row(Switch(Setting{Name: "s3-skip-ssl-verify", Category: Snapshots, Roles: Server,
		Help: "Do not verify the certificate of the S3 server"}))
	S3EndpointCA = row(Text(Setting{Name: "s3-endpoint-ca", Category: Snapshots, Roles: Server,
		Help: "`FILE` with the authority of the S3 server's certificate (default: the system's authorities)"}))
	S3Insecure = row(Switch(Setting{Name: "s3-insecure", Category: Snapshots, Roles: Server,
		Help: "Use HTTP instead of HTTPS for S3"}))
	S3Timeout = row(Duration(Setting{Name: "s3-timeout", Category: Snapshots, Roles: Server, Default: "5m0s",
		Help: "`TIME` after which a transfer is given up if nothing gets through"}))
	S3ConfigSecret = row(Text(Setting{Name: "s3-config-secret", Category: Snapshots, Roles: Server,
		Help: "`NAME` of a Secret in kube-system with the settings of S3, under the names that k3s has for them, instead of the flags"}))

	APIServerArgs = row(Verbatim(Setting{Name: "kube-apiserver-arg", Category: Upstream, Roles: Server,
		Help: "`NAME=VALUE` for kube-apiserver (can be repeated)"}))
	ControllerArgs = row(Verbatim(Setting{Name: "kube-controller-manager-arg", Category: Upstream, Roles: Server,
		Help: "`NAME=VALUE` for kube-controller-manager (can be repeated)"}))
	SchedulerArgs = row(Verbatim(Setting{Name: "kube-scheduler-arg", Category: Upstream, Roles: Server,
		Help: "`NAME=VALUE` for kube-scheduler (can be repeated)"}))
	KubeletArgs = row(Verbatim(Setting{Name: "kubelet-arg", Category: Upstream, Roles: Both,
		Help: "`NAME=VALUE` for the kubelet (can be repeated)"}))
)

// rows has all settings of servers and agents, in their order. Only row changes it, while the package is
// initialised: Go initialises the variables from top to bottom, as long as no row depends on another variable.
var rows []*Setting

func row[T any](o Of[T]) Of[T] {
	rows = append(rows, o.Setting)
	return o
}

// For returns the settings of a role, with the help for that role.
func For(r Role) []*Setting {
	var out []*Setting
	for _, s := range rows {
		if s.Roles&r != 0 {
			own := *s
			own.Help = s.help(r)
			out = append(out, &own)
		}
	}
	return out
}

// Components that --disable can leave out.
const (
	ComponentDNS       = "dns"
	ComponentServiceLB = "servicelb"
)

// k3sComponents returns components that only k3s has. Users of k3s often have them in --disable.
func k3sComponents() []string {
	return []string{"local-storage", "metrics-server", "runtimes", "traefik"}
}

// parseComponent parses a component of --disable: kedge's names, k3s's names for the same, and the components that only
// k3s has.
func parseComponent(text string) (string, error) {
	switch text {
	case ComponentDNS, "coredns":
		return ComponentDNS, nil
	case ComponentServiceLB:
		return ComponentServiceLB, nil
	}
	if slices.Contains(k3sComponents(), text) {
		return text, nil
	}
	known := []string{"coredns", ComponentDNS, ComponentServiceLB}
	return "", fmt.Errorf(" %q must be one of %s%s", text, strings.Join(known, ", "), DidYouMean(text, slices.Concat(known, k3sComponents())))
}

// absolutePath parses the path of a folder that commands and servers must find alike, wherever they are started.
func absolutePath(text string) (string, error) {
	if text != "" && !filepath.IsAbs(text) {
		return "", fmt.Errorf(" %q is not an absolute path", text)
	}
	return text, nil
}

// retention parses how many snapshots are kept.
func retention(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		return 0, fmt.Errorf(" %q is not a number of snapshots, at least 1; --snapshot-schedule=off takes none", text)
	}
	return n, nil
}

// wireGuardOfK3s is k3s's name for the backend wireguard.
const wireGuardOfK3s = "wireguard-native"

func logLevel(text string) (slog.Level, error) {
	level, err := logging.ParseLevel(text)
	if err != nil {
		return level, fmt.Errorf(": %w", err)
	}
	return level, nil
}

// nodePortAddress parses a range, or "primary", which is the zero range.
func nodePortAddress(text string) (netip.Prefix, error) {
	if text == "primary" {
		return netip.Prefix{}, nil
	}
	return addressRange(text)
}

// portRange checks a range in the forms that the API server accepts: FIRST-LAST, FIRST+MORE or one port.
func portRange(text string) (string, error) {
	r, err := utilnet.ParsePortRange(text)
	if err != nil || r.Base < 1 || r.Size < 1 {
		return "", fmt.Errorf(" %q is not a range of ports such as 30000-32767", text)
	}
	return text, nil
}

// serverURL parses the URL of a server to join.
func serverURL(text string) (string, error) {
	if text != "" && !joining.ValidServer(text) {
		return "", fmt.Errorf(" %q is not like https://HOST:6443", text)
	}
	return text, nil
}

// nodeName parses the name of a node; empty means the host name.
func nodeName(text string) (string, error) {
	name := strings.ToLower(strings.TrimSpace(text))
	if name == "" {
		return "", nil
	}
	if err := CheckNodeName(name); err != nil {
		return "", fmt.Errorf(" %q: %w", name, err)
	}
	return name, nil
}

// CheckNodeName returns an error if a lower-case name is not valid for a node (RFC 1123, section 2.1, and the
// maximum length of a label's value).
func CheckNodeName(name string) error {
	wrong := ""
	switch {
	case name == "":
		wrong = "it is empty"
	case len(name) > 63:
		wrong = fmt.Sprintf("it has %d characters", len(name))
	}
	for _, r := range name {
		if wrong == "" && !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.') {
			wrong = fmt.Sprintf("it has the character %q", r)
		}
	}
	for label := range strings.SplitSeq(name, ".") {
		switch {
		case wrong != "":
		case label == "":
			wrong = "a dot must stand between letters or digits"
		case strings.HasPrefix(label, "-") || strings.HasSuffix(label, "-"):
			wrong = "a dash must stand between letters or digits"
		}
	}
	if wrong == "" {
		return nil
	}
	return errors.New(wrong + "; want at most 63 letters, digits, dots and dashes")
}
