package server

import (
	"fmt"
	"log/slog"
	"net/netip"

	"k8s.io/client-go/kubernetes"

	"kedge/datastore"
	"kedge/internal/token"
	"kedge/server/bootstrap"
	"kedge/server/directory"
	"kedge/server/identity"
	"kedge/server/join"
	"kedge/server/loopback"
	"kedge/server/tunnels"
)

// NewServers makes what this server knows of the others.
func NewServers(cfg Config, lb *loopback.Loopback, store *datastore.Store, log *slog.Logger) (*Servers, error) {
	c, err := kubernetes.NewForConfig(lb.Admin())
	if err != nil {
		return nil, fmt.Errorf("make the client of the servers' list: %w", err)
	}
	api := netip.AddrPortFrom(cfg.AdvertiseAddress, uint16(cfg.HTTPSPort))
	return &Servers{name: cfg.NodeName, dir: cfg.Dir, store: store, api: c, list: directory.New(cfg.NodeName, api, c, log)}, nil
}

// Directory is the component that keeps the list of servers.
func (s *Servers) Directory() *directory.Directory { return s.list }

// NewEndpoints makes the component that publishes the servers, for the one that leads.
func (s *Servers) NewEndpoints(id *identity.Identity, log *slog.Logger) *directory.Endpoints {
	return directory.NewEndpoints(s.list, s, id.ServerCA.Cert, s.api, log)
}

// NewJoin makes what lets machines into the cluster. It answers once the API does.
// addresses are the machine's own, at any time.
func NewJoin(cfg Config, id *identity.Identity, servers *Servers, addresses func() []netip.Addr, log *slog.Logger) *join.Service {
	s := join.New(join.Config{
		ServerCA: id.ServerCA, ClientCA: id.ClientCA, KubeletCA: id.KubeletCA,
		Preshared: map[join.Role]token.Secret{join.Agent: cfg.Token, join.Server: cfg.ServerToken}, Cluster: cfg.Cluster, NetworkGroup: bootstrap.NetworkGroup,
		OwnAddresses: addresses, Life: cfg.AgentCertificateLife, Servers: servers,
	}, servers.api, log)
	servers.nodes = s.Nodes()
	return s
}

// NewHub makes the server's end of the nodes' tunnels. gate says when one has to end.
func NewHub(cfg Config, joins *join.Service, gate *join.Gate, log *slog.Logger) *tunnels.Hub {
	c := tunnels.Config{
		Door: joins, Keys: gate, PodRanges: cfg.ClusterCIDRs, ServiceRanges: cfg.ServiceCIDRs, ForeignPods: cfg.ForeignPods,
	}
	if cfg.HasNode {
		c.OwnNode = cfg.NodeName
	}
	return tunnels.New(c, log)
}
