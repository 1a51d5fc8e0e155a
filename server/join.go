package server

import (
	"fmt"
	"log/slog"

	"k8s.io/client-go/kubernetes"

	"kedge/server/join"
	"kedge/server/loopback"
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
