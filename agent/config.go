package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"

	"k8s.io/client-go/rest"

	"kedge/internal/componentflags"
)

// Config is everything the node is told. Package main composes it once; it is
// passed by value and not changed afterwards.
type Config struct {
	DataDir string // the kubelet's directory and logs are below it
	RunDir  string

	NodeName string
	NodeIPs  []netip.Addr // at first: one, or one of each family
	// Addresses are the node's at any time, and ExternalIPs those that it has elsewhere:
	// what is behind a router does not see them.
	Addresses   func() []netip.Addr
	ExternalIPs []netip.Addr
	NodeLabels  []string // KEY=VALUE, set at registration
	NodeTaints  []string // KEY=VALUE:EFFECT, set at registration

	ClusterDNS    []netip.Addr
	ClusterDomain string
	ResolvConf    string // for pods with dnsPolicy Default; empty means: none

	RuntimeEndpoint string // containerd's socket
	CgroupRoot      string // below which all pods are; carries the node's name
	SystemdCgroups  bool   // systemd owns the tree of control groups

	// The kubelet's serving certificate and whom it lets in.
	ServingCert string
	ServingKey  string
	ClientCA    string

	KubeletPort int
	KubeletArgs []string // user's, NAME=VALUE

	// Volumes keeps the kubelet's volume plugins apart from those of the controllers
	// of this process. Nil where it has none.
	Volumes *Volumes

	// Client is how the kubelet reaches the API: in memory on a server.
	Client *rest.Config
}

// DefaultConfig returns the settings that do not depend on the machine.
func DefaultConfig() Config {
	return Config{ClusterDomain: "cluster.local", KubeletPort: 10250}
}

// Validate reports everything that is wrong with c, joined.
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
	if c.OthersAddresses() && len(c.ExternalIPs) > 0 {
		errs = append(errs, errors.New("--node-external-ip and --kubelet-arg=node-ip or cloud-provider exclude each other: leave one out"))
	}
	if len(c.NodeIPs) == 0 {
		errs = append(errs, errors.New("the node has no address; give one with --node-ip"))
	}
	if c.KubeletPort < 1 || c.KubeletPort > 65535 {
		errs = append(errs, fmt.Errorf("--kubelet-port %d is not between 1 and 65535", c.KubeletPort))
	}
	for _, l := range c.NodeLabels {
		if err := checkLabel(l); err != nil {
			errs = append(errs, fmt.Errorf("--node-label %q: %w", l, err))
		}
	}
	for i, t := range c.NodeTaints {
		err := checkTaint(t)
		if err == nil && slices.ContainsFunc(c.NodeTaints[:i], func(earlier string) bool { return sameTaint(t, earlier) }) {
			err = errors.New("there is one of this key and effect already")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("--node-taint %q: %w", t, err))
		}
	}
	errs = append(errs, componentflags.Check(c.KubeletArgs, fromKubelet, decided, componentflags.Logging, componentflags.Clients))
	return errors.Join(errs...)
}

// kubeletDir is the kubelet's root directory.
func (c Config) kubeletDir() string { return filepath.Join(c.DataDir, "kubelet") }

// logDir is where the logs of containers are.
func (c Config) logDir() string { return filepath.Join(c.DataDir, "log") }

// StaticPodDir is the folder whose manifests the kubelet runs without the API.
func (c Config) StaticPodDir() string { return filepath.Join(c.DataDir, "pod-manifests") }
