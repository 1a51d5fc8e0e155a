package server

import (
	"fmt"
	"log/slog"

	"k8s.io/client-go/kubernetes"

	"kedge/server/join"
	"kedge/server/loopback"
	"kedge/server/tunnels"
)

// NewJoin makes what lets machines into the cluster. It answers once the API does.
func NewJoin(cfg Config, id *Identity, lb *loopback.Loopback, log *slog.Logger) (*join.Service, error) {
	c, err := kubernetes.NewForConfig(lb.Admin())
	if err != nil {
		return nil, fmt.Errorf("make the client of joining: %w", err)
	}
	return join.New(join.Config{
		ServerCA: id.ServerCA, ClientCA: id.ClientCA, KubeletCA: id.KubeletCA,
		Preshared: cfg.Token, Cluster: cfg.Cluster, NetworkGroup: NetworkGroup,
		OwnAddresses: cfg.NodeIPs, Life: join.Life,
	}, c, log), nil
}

// NewHub makes the server's end of the nodes' tunnels.
func NewHub(cfg Config, joins *join.Service, log *slog.Logger) *tunnels.Hub {
	c := tunnels.Config{
		Door: joins, Keys: joins.Nodes(), PodRanges: cfg.ClusterCIDRs, ServiceRanges: cfg.ServiceCIDRs, ForeignPods: cfg.ForeignPods,
	}
	if cfg.HasNode {
		c.OwnNode = cfg.NodeName
	}
	return tunnels.New(c, log)
}
