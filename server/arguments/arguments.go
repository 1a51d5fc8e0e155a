// Package arguments is what kube-apiserver, kube-controller-manager and kube-scheduler
// are told: what kedge gives them, laid under what the user gives with --kube-apiserver-arg
// and its siblings. It knows which flags exclude each other, which add up, and which
// users cannot give.
//
// It is apart from package server so that its tests need not link the components, and
// reads no files. It may be imported by server.
package arguments

import (
	"errors"
	"fmt"
	"maps"
	"strings"

	"sigs.k8s.io/yaml"

	"kedge/internal/componentflags"
)

// The flags of kedge that the arguments come from.
const (
	FromAPIServer   = "--kube-apiserver-arg"
	FromControllers = "--kube-controller-manager-arg"
	FromScheduler   = "--kube-scheduler-arg"
)

// ownAuthority is why a certificate or authority cannot be another.
const ownAuthority = "the cluster's own authorities sign for nodes and servers; leave it out"

var apiServer = componentflags.Decided{
	"advertise-address":             "use --advertise-address",
	"bind-address":                  "use --bind-address",
	"egress-selector-config-file":   "kedge has its own way to the nodes; leave it out",
	"endpoint-reconciler-type":      "kedge keeps the endpoints of the service kubernetes itself; leave it out",
	"etcd-servers":                  "kedge has its own store; leave it out",
	"kubelet-certificate-authority": ownAuthority,
	"kubelet-client-certificate":    ownAuthority,
	"kubelet-client-key":            ownAuthority,
	"permit-address-sharing":        "kedge opens the API's port itself; leave it out",
	"permit-port-sharing":           "kedge opens the API's port itself; leave it out",
	"secure-port":                   "use --https-listen-port",
	"service-account-signing-key-file": "all servers sign with DATA-DIR/server/tls/service-account.key; put an ECDSA key of your own there before the first start; " +
		"keys whose tokens shall be good too are given with service-account-key-file",
	"service-cluster-ip-range": "use --service-cidr",
	"service-node-port-range":  "use --service-node-port-range",
	"shutdown-delay-duration":  "kedge stops its parts in an order of its own; leave it out",
	"tls-cert-file":            "nodes trust the cluster's own authority only; use --tls-san for more names, and tls-sni-cert-key for a certificate of your own",
	"tls-private-key-file":     "nodes trust the cluster's own authority only; use --tls-san for more names, and tls-sni-cert-key for a certificate of your own",
}

// election is why nobody elects: the store has done so already.
const election = "whoever leads the store leads the cluster; leave it out"

var controllers = componentflags.Decided{
	"cluster-cidr":                     "use --cluster-cidr",
	"controller-start-interval":        "the controllers start at once; leave it out",
	"enable-leader-migration":          election,
	"leader-elect*":                    election,
	"leader-migration-config":          election,
	"root-ca-file":                     ownAuthority,
	"service-account-private-key-file": "all servers sign with DATA-DIR/server/tls/service-account.key; put an ECDSA key of your own there before the first start",
	"service-cluster-ip-range":         "use --service-cidr",
	"use-service-account-credentials":  "each controller acts as its own service account; leave it out",
}

var scheduler = componentflags.Decided{
	"leader-elect*":   election,
	"write-config-to": "it would end the scheduler; leave it out",
}

// Check says all that is wrong with what the user gives, as far as that can be seen
// without the components.
func Check(forAPIServer, forControllers, forScheduler []string) error {
	return errors.Join(
		componentflags.Check(forAPIServer, FromAPIServer, apiServer, componentflags.Logging),
		componentflags.Check(forControllers, FromControllers, controllers, componentflags.Logging, componentflags.Clients),
		componentflags.Check(forScheduler, FromScheduler, scheduler, componentflags.Logging, componentflags.Clients),
	)
}

// APIServer returns the command line of kube-apiserver: defaults, and user's where it
// says something else.
func APIServer(defaults map[string]string, user []string) ([]string, error) {
	d := maps.Clone(defaults)
	if componentflags.Has(user, "authorization-config") {
		delete(d, "authorization-mode") // the file says it
	}
	if componentflags.Has(user, "service-account-signing-endpoint") {
		delete(d, "service-account-key-file") // what is there holds the keys
		delete(d, "service-account-signing-key-file")
	}
	// The old way to say which plug-ins there are takes the place of the new one, and
	// excludes it.
	plugins := "enable-admission-plugins"
	if componentflags.Has(user, "admission-control") {
		d["admission-control"] = d[plugins]
		delete(d, plugins)
		plugins = "admission-control"
	}
	if disables(user, d[plugins]) {
		delete(d, plugins)
	}
	// Lists to which user adds: upstream collects what it finds in several places.
	var first []string
	for _, name := range []string{plugins, "service-account-key-file"} {
		if value, ok := d[name]; ok && componentflags.Has(user, name) {
			first = append(first, name+"="+value)
		}
	}
	return componentflags.Merge(d, append(first, user...), FromAPIServer)
}

// disables reports whether user wants to do without an admission plug-in.
func disables(user []string, plugin string) bool {
	for _, arg := range user {
		name, value, _ := componentflags.Split(arg)
		if name != "disable-admission-plugins" {
			continue
		}
		for p := range strings.SplitSeq(value, ",") {
			if strings.TrimSpace(p) == plugin {
				return true
			}
		}
	}
	return false
}

// Controllers is likewise for kube-controller-manager.
func Controllers(defaults map[string]string, user []string) ([]string, error) {
	d := maps.Clone(defaults)
	// One authority for all signers excludes one for each.
	if componentflags.Has(user, "cluster-signing-cert-file") || componentflags.Has(user, "cluster-signing-key-file") {
		maps.DeleteFunc(d, func(name, _ string) bool {
			return strings.HasPrefix(name, "cluster-signing-") && strings.HasSuffix(name, "-file")
		})
	}
	return componentflags.Merge(d, user, FromControllers)
}

// Scheduler is likewise for kube-scheduler.
func Scheduler(defaults map[string]string, user []string) ([]string, error) {
	return componentflags.Merge(defaults, user, FromScheduler)
}

// SaysWhoIsAnonymous reports whether a file for authentication-config says what may be
// asked without credentials. Where it does not, kedge's own rule stands.
func SaysWhoIsAnonymous(file []byte) (bool, error) {
	var c struct {
		Anonymous any `json:"anonymous"`
	}
	if err := yaml.Unmarshal(file, &c); err != nil {
		return false, fmt.Errorf("%s: authentication-config: %w", FromAPIServer, err)
	}
	return c.Anonymous != nil, nil
}
