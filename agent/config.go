package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"k8s.io/client-go/rest"

	"kedge/agent/hostpaths"
	"kedge/agent/nodeobject"
	"kedge/internal/componentflags"
	"kedge/internal/errorkind"
)

// Config is the configuration of the node. Package assembly composes it once; it is passed by value and not
// changed afterwards.
type Config struct {
	DataDir string // parent of the kubelet's directory and of the logs
	RunDir  string

	NodeName string
	NodeIPs  []netip.Addr // at the start: one address, or one of each family
	// ExternalIPs are addresses of the node that only machines outside its network see, such as those of a router.
	ExternalIPs []netip.Addr
	NodeLabels  []string // KEY=VALUE, set at registration
	NodeTaints  []string // KEY=VALUE:EFFECT, set at registration

	ClusterDNS    []netip.Addr
	ClusterDomain string
	ResolvConf    string // for pods with dnsPolicy Default; empty means that they get no resolver

	RuntimeEndpoint string // containerd's socket
	CgroupRoot      string // parent of all pods' cgroups; its name contains the node's name
	SystemdCgroups  bool   // systemd manages the cgroup tree

	// HostPaths puts volumes and logs in the standard folders of the host, where CSI drivers and log collectors
	// expect them.
	HostPaths bool

	KubeletPort int
	KubeletArgs []string // the user's arguments, NAME=VALUE
}

// Dependencies are what the kubelet needs of other parts of the process.
type Dependencies struct {
	// Client is how the kubelet calls the API: in memory on a server.
	Client *rest.Config
	// Addresses returns the node's addresses, which may change.
	Addresses func() []netip.Addr
	// ServingCert and ServingKey are the files of the kubelet's serving certificate.
	ServingCert, ServingKey string
	// ClientCA is the file with the authority that signs for the kubelet's clients.
	ClientCA string
	// Volumes keeps the kubelet's volume plugins apart from those of the controllers of this process. Nil where the
	// process has no controllers.
	Volumes *Volumes
}

// DefaultConfig returns the settings that do not depend on the machine.
func DefaultConfig() Config {
	return Config{ClusterDomain: "cluster.local", KubeletPort: 10250}
}

// Validate reports all errors of c, joined.
func (c Config) Validate() error {
	var errs []error
	for name, dir := range map[string]string{"data": c.DataDir, "run": c.RunDir} {
		if !filepath.IsAbs(dir) {
			errs = append(errs, fmt.Errorf("%s directory %q is not an absolute path", name, dir))
		}
	}
	if c.NodeName == "" {
		errs = append(errs, errors.New("the node has no name; give one with --node-name"))
	}
	if c.AddressSourceOverridden() && len(c.ExternalIPs) > 0 {
		errs = append(errs, errorkind.BadSettings("node-external-ip", "", "kubelet-arg", "=node-ip or cloud-provider exclude each other: leave one out"))
	}
	if len(c.NodeIPs) == 0 {
		errs = append(errs, errors.New("the node has no address; give one with --node-ip"))
	}
	if c.KubeletPort < 1 || c.KubeletPort > 65535 {
		errs = append(errs, errorkind.BadSetting("kubelet-port", " %d is not between 1 and 65535", c.KubeletPort))
	}
	for _, l := range c.NodeLabels {
		if err := nodeobject.CheckLabel(l); err != nil {
			errs = append(errs, errorkind.BadItem("node-label", l, " %q: %w", l, err))
		}
	}
	for i, t := range c.NodeTaints {
		err := nodeobject.CheckTaint(t)
		if err == nil && slices.ContainsFunc(c.NodeTaints[:i], func(earlier string) bool { return nodeobject.SameTaint(t, earlier) }) {
			err = errors.New("a taint with this key and effect is given already")
		}
		if err != nil {
			errs = append(errs, errorkind.BadItem("node-taint", t, " %q: %w", t, err))
		}
	}
	errs = append(errs, componentflags.Check(c.KubeletArgs, fromKubelet, decided, componentflags.Logging, componentflags.Clients))
	return errors.Join(errs...)
}

// places returns the kubelet's folders.
func (c Config) places() hostpaths.Places {
	if c.HostPaths {
		return hostpaths.Standard()
	}
	return hostpaths.Below(c.DataDir)
}

// otherPlaces returns the folders that would be used with the opposite value of HostPaths.
func (c Config) otherPlaces() hostpaths.Places {
	c.HostPaths = !c.HostPaths
	return c.places()
}

// kubeletDir is the kubelet's root directory.
func (c Config) kubeletDir() string { return c.places().Kubelet }

// StaticPodDir is the folder with the manifests of static pods.
func (c Config) StaticPodDir() string { return filepath.Join(c.DataDir, "pod-manifests") }

// AddressSourceOverridden reports whether the user has chosen another source of the node's addresses: the kubelet's own
// flags, or a cloud controller manager.
func (c Config) AddressSourceOverridden() bool {
	return componentflags.Has(c.KubeletArgs, "node-ip") || componentflags.Has(c.KubeletArgs, "cloud-provider")
}
