package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
	"kedge/network/cniclient"
)

// config is the network configuration as the runtime passes it.
type config struct {
	types.PluginConf
	RuntimeConfig struct {
		PortMappings []portMapping `json:"portMappings"`
	} `json:"runtimeConfig"`
}

// portMapping is a host port as the runtime passes it.
type portMapping struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP"`
}

// note is the data that a lease stores besides its addresses.
type note struct {
	Netns   string               `json:"netns"`
	NetnsID namespaces.NetworkID `json:"netnsID"`
	Pod     string               `json:"pod,omitempty"` // namespace/name
	UID     string               `json:"uid,omitempty"` // of the pod
	Ports   []hostPort           `json:"ports,omitempty"`
}

// hostPort is a checked portMapping.
type hostPort struct {
	HostIP   netip.Addr `json:"hostIP,omitzero"` // zero: every address of the pod's families
	Host     uint16     `json:"host"`
	Pod      uint16     `json:"pod"`
	Protocol uint8      `json:"protocol"`
}

func (p hostPort) String() string {
	name := map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_SCTP: "sctp"}[p.Protocol]
	if p.HostIP.IsValid() {
		return fmt.Sprintf("%s/%s", netip.AddrPortFrom(p.HostIP, p.Host), name)
	}
	return fmt.Sprintf("%d/%s", p.Host, name)
}

// conflicts reports whether two host ports claim the same packets.
func (p hostPort) conflicts(o hostPort) bool {
	if p.Protocol != o.Protocol || p.Host != o.Host {
		return false
	}
	wild := func(a netip.Addr) bool { return !a.IsValid() }
	if wild(p.HostIP) || wild(o.HostIP) {
		return true
	}
	if p.HostIP.Is4() != o.HostIP.Is4() {
		return false
	}
	return p.HostIP == o.HostIP || p.HostIP.IsUnspecified() || o.HostIP.IsUnspecified()
}

func parseConfig(raw json.RawMessage) (config, error) {
	var c config
	if err := json.Unmarshal(raw, &c); err != nil {
		return c, types.NewError(types.ErrDecodingFailure, "read network configuration", err.Error())
	}
	return c, nil
}

func (c config) hostPorts() ([]hostPort, error) {
	var ports []hostPort
	for _, m := range c.RuntimeConfig.PortMappings {
		if m.HostPort == 0 {
			continue // a declared container port without a host port
		}
		p, err := m.check()
		if err != nil {
			return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("host port %d", m.HostPort), err.Error())
		}
		ports = append(ports, p)
	}
	return ports, nil
}

func (m portMapping) check() (hostPort, error) {
	p := hostPort{Host: uint16(m.HostPort), Pod: uint16(m.ContainerPort)}
	if m.HostPort < 1 || m.HostPort > 65535 || m.ContainerPort < 1 || m.ContainerPort > 65535 {
		return p, fmt.Errorf("ports are 1 to 65535, not %d and %d", m.HostPort, m.ContainerPort)
	}
	switch strings.ToLower(m.Protocol) {
	case "tcp", "":
		p.Protocol = unix.IPPROTO_TCP
	case "udp":
		p.Protocol = unix.IPPROTO_UDP
	case "sctp":
		p.Protocol = unix.IPPROTO_SCTP
	default:
		return p, fmt.Errorf("protocol %q is not tcp, udp or sctp", m.Protocol)
	}
	if m.HostIP != "" {
		ip, err := netip.ParseAddr(m.HostIP)
		if err != nil {
			return p, err
		}
		p.HostIP = ip.Unmap()
	}
	return p, nil
}

// podName reads who the pod is, as namespace/name and UID, from CNI_ARGS, which
// has the form "A=1;B=2".
func podName(args string) (pod, uid string) {
	var namespace, name string
	for pair := range strings.SplitSeq(args, ";") {
		switch key, value, _ := strings.Cut(pair, "="); key {
		case "K8S_POD_NAMESPACE":
			namespace = value
		case "K8S_POD_NAME":
			name = value
		case "K8S_POD_UID":
			uid = value
		}
	}
	if name == "" {
		return "", ""
	}
	return namespace + "/" + name, uid
}

// checkRequest looks at what every request about one attachment must have.
func checkRequest(r cniclient.Request, needNetns bool) error {
	bad := func(what string) error {
		return types.NewError(types.ErrInvalidEnvironmentVariables, what, "")
	}
	switch {
	case r.ContainerID == "" || strings.ContainsAny(r.ContainerID, "/ "):
		return bad(fmt.Sprintf("CNI_CONTAINERID %q is not a container identifier", r.ContainerID))
	case r.IfName == "" || len(r.IfName) >= unix.IFNAMSIZ || strings.ContainsAny(r.IfName, "/: ") || r.IfName == "." || r.IfName == "..":
		return bad(fmt.Sprintf("CNI_IFNAME %q is not an interface name", r.IfName))
	case needNetns && r.Netns == "":
		return bad("CNI_NETNS is missing")
	}
	return nil
}
