// Package arguments composes the command lines of kube-apiserver, kube-controller-manager and kube-scheduler
// from kedge's defaults and the user's --kube-apiserver-arg, --kube-controller-manager-arg and
// --kube-scheduler-arg. It knows which flags exclude each other, which add up, and which users cannot set.
//
// It is separate from package server so that its tests need not link the components, and reads no files.
// Package server may import it.
package arguments

import (
	"errors"
	"maps"
	"strings"

	"sigs.k8s.io/yaml"

	"kedge/internal/componentflags"
	"kedge/internal/errorkind"
)

// The settings of kedge that contain the arguments.
const (
	FromAPIServer   = "kube-apiserver-arg"
	FromControllers = "kube-controller-manager-arg"
	FromScheduler   = "kube-scheduler-arg"
)

// ownAuthority is the reason why kedge's certificates and authorities cannot be replaced.
const ownAuthority = "the cluster's own authorities sign for nodes and servers; leave it out"

var apiServer = componentflags.Decided{
	"advertise-address":             "use --advertise-address",
	"bind-address":                  "use --bind-address",
	"egress-selector-config-file":   "kedge reaches nodes through its own tunnels; leave it out",
	"endpoint-reconciler-type":      "kedge maintains the endpoints of the service kubernetes itself; leave it out",
	"etcd-cafile":                   "use --datastore-cafile",
	"etcd-certfile":                 "use --datastore-certfile",
	"etcd-keyfile":                  "use --datastore-keyfile",
	"etcd-servers":                  "use --datastore-endpoint, or leave it out for kedge's own datastore",
	"kubelet-certificate-authority": ownAuthority,
	"kubelet-client-certificate":    ownAuthority,
	"kubelet-client-key":            ownAuthority,
	"permit-address-sharing":        "kedge opens the API's port itself; leave it out",
	"permit-port-sharing":           "kedge opens the API's port itself; leave it out",
	"secure-port":                   "use --https-listen-port",
	"service-account-signing-key-file": "all servers sign with DATA-DIR/server/tls/service-account.key; put an ECDSA or RSA key of your own there before the first start, or replace it with \"kedge service-account-key rotate\"; " +
		"add keys whose tokens are to be accepted too with service-account-key-file",
	"service-cluster-ip-range": "use --service-cidr",
	"service-node-port-range":  "use --service-node-port-range",
	"shutdown-delay-duration":  "kedge stops its components in its own order; leave it out",
	"tls-cert-file":            "nodes trust the cluster's own authority only; use --tls-san for more names, and tls-sni-cert-key for a certificate of your own",
	"tls-private-key-file":     "nodes trust the cluster's own authority only; use --tls-san for more names, and tls-sni-cert-key for a certificate of your own",
}

// election explains why there is no leader election by leases: the datastore has elected a leader.
const election = "the leader of the datastore leads the cluster; leave it out"

var controllers = componentflags.Decided{
	"cluster-cidr":                     "use --cluster-cidr",
	"controller-start-interval":        "the controllers start at once; leave it out",
	"enable-leader-migration":          election,
	"leader-elect*":                    election,
	"leader-migration-config":          election,
	"root-ca-file":                     ownAuthority,
	"service-account-private-key-file": "all servers sign with DATA-DIR/server/tls/service-account.key; put an ECDSA or RSA key of your own there before the first start, or replace it with \"kedge service-account-key rotate\"",
	"service-cluster-ip-range":         "use --service-cidr",
	"use-service-account-credentials":  "each controller acts as its own service account; leave it out",
}

var scheduler = componentflags.Decided{
	"leader-elect*":   election,
	"write-config-to": "it would end the scheduler; leave it out",
}

// Check reports the errors in the user's arguments that can be found without the components.
func Check(forAPIServer, forControllers, forScheduler []string) error {
	return errors.Join(
		componentflags.Check(forAPIServer, FromAPIServer, apiServer, componentflags.Logging),
		componentflags.Check(forControllers, FromControllers, controllers, componentflags.Logging, componentflags.Clients),
		componentflags.Check(forScheduler, FromScheduler, scheduler, componentflags.Logging, componentflags.Clients),
	)
}

// APIServer returns the command line of kube-apiserver: the defaults, overridden by the user's arguments.
func APIServer(defaults map[string]string, user []string) ([]string, error) {
	d := maps.Clone(defaults)
	if componentflags.Has(user, "authorization-config") {
		delete(d, "authorization-mode") // the file replaces it
	}
	if componentflags.Has(user, "service-account-signing-endpoint") {
		delete(d, "service-account-key-file") // the signer at the endpoint has the keys
		delete(d, "service-account-signing-key-file")
	}
	// The deprecated flag for admission plugins replaces the new flag, and the two exclude each other.
	plugins := "enable-admission-plugins"
	if componentflags.Has(user, "admission-control") {
		d["admission-control"] = d[plugins]
		delete(d, plugins)
		plugins = "admission-control"
	}
	if disables(user, d[plugins]) {
		delete(d, plugins)
	}
	// Lists to which the user's values are added: upstream accumulates repeated flags.
	var first []string
	for _, name := range []string{plugins, "service-account-key-file"} {
		if value, ok := d[name]; ok && componentflags.Has(user, name) {
			first = append(first, name+"="+value)
		}
	}
	return componentflags.Merge(d, append(first, user...), FromAPIServer)
}

// disables reports whether the user disables an admission plugin.
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

// Controllers returns the command line of kube-controller-manager.
func Controllers(defaults map[string]string, user []string) ([]string, error) {
	d := maps.Clone(defaults)
	// One authority for all signers excludes an authority for each signer.
	if componentflags.Has(user, "cluster-signing-cert-file") || componentflags.Has(user, "cluster-signing-key-file") {
		maps.DeleteFunc(d, func(name, _ string) bool {
			return strings.HasPrefix(name, "cluster-signing-") && strings.HasSuffix(name, "-file")
		})
	}
	return componentflags.Merge(d, user, FromControllers)
}

// Scheduler returns the command line of kube-scheduler.
func Scheduler(defaults map[string]string, user []string) ([]string, error) {
	return componentflags.Merge(defaults, user, FromScheduler)
}

// SaysWhoIsAnonymous reports whether a file for authentication-config configures anonymous requests. Otherwise
// kedge's own rule applies.
func SaysWhoIsAnonymous(file []byte) (bool, error) {
	var c struct {
		Anonymous any `json:"anonymous"`
	}
	if err := yaml.Unmarshal(file, &c); err != nil {
		return false, errorkind.BadSetting(FromAPIServer, ": authentication-config: %w", err)
	}
	return c.Anonymous != nil, nil
}
