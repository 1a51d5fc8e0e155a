package agent

import "kedge/internal/componentflags"

// fromKubelet is the setting of kedge that contains the kubelet's arguments.
const fromKubelet = "kubelet-arg"

const (
	ownRuntime     = "kedge runs containerd itself; leave it out"
	ownGroups      = "kedge creates the pods' cgroup itself; leave it out"
	ownCertificate = "kedge gets and renews the kubelet's certificate itself; leave it out"
)

// decided are the kubelet's flags that kedge sets itself, with the reason for the user.
var decided = componentflags.Decided{
	"bootstrap-kubeconfig":       "kedge connects its components itself; leave it out",
	"cgroup-driver":              ownGroups,
	"cgroup-root":                ownGroups,
	"client-ca-file":             "the cluster's own authorities sign for nodes and servers; leave it out",
	"container-runtime-endpoint": ownRuntime,
	"event-burst":                componentflags.Clients["kube-api-*"],
	"event-qps":                  componentflags.Clients["kube-api-*"],
	"hostname-override":          "use --node-name",
	"image-service-endpoint":     ownRuntime,
	"port":                       "use --kubelet-port",
	"root-dir":                   "use --data-dir or --host-paths",
	"rotate-server-certificates": ownCertificate,
	"tls-cert-file":              ownCertificate,
	"tls-private-key-file":       ownCertificate,
}
