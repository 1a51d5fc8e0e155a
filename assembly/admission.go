package assembly

import (
	"log/slog"
	"net/netip"

	"kedge/datastore"
	"kedge/internal/joining"
	"kedge/server"
	"kedge/server/bootstrap"
	"kedge/server/identity"
	"kedge/server/join"
	"kedge/server/membership"
	"kedge/server/tunnels"
)

// newJoin returns the join service, which admits machines to the cluster. It works once the API server is
// ready. addresses returns the machine's current addresses.
func newJoin(cfg server.Config, id *identity.Identity, servers *membership.Servers, addresses func() []netip.Addr, log *slog.Logger) *join.Service {
	s := join.New(join.Config{
		ServerCA: id.ServerCA, ClientCA: id.ClientCA, KubeletCA: id.KubeletCA, PeerCA: id.PeerCA, PeerName: datastore.PeerServerName,
		Preshared: map[joining.Role]joining.Secret{joining.Agent: cfg.Token, joining.Server: cfg.ServerToken}, Cluster: cfg.Cluster, NetworkGroup: bootstrap.NetworkGroup,
		OwnAddresses: addresses, Life: cfg.AgentCertificateLife, Servers: servers, External: cfg.ExternalDatastore,
	}, servers.API(), log)
	servers.SetNodes(s.Nodes())
	return s
}

// newHub returns the server's end of the nodes' tunnels. gate reports the nodes whose tunnels must be closed; kubelet is the
// address of this server's own kubelet, if it has one.
func newHub(cfg server.Config, joins *join.Service, gate *join.Gate, kubelet netip.AddrPort, log *slog.Logger) *tunnels.Hub {
	c := tunnels.Config{
		Authenticator: joins, Keys: gate, PodRanges: cfg.ClusterCIDRs, ServiceRanges: cfg.ServiceCIDRs, ForeignPods: cfg.ForeignPods,
	}
	if cfg.HasNode {
		c.OwnNode, c.OwnKubelet = cfg.NodeName, kubelet
	}
	return tunnels.New(c, log)
}
