package assembly

import (
	"cmp"
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"kedge/agent"
	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/appliance/remote"
	"kedge/appliance/upgrades"
	"kedge/datastore"
	"kedge/internal/datadir"
	"kedge/internal/kernelnet"
	"kedge/internal/lifecycle"
	"kedge/internal/servers"
	"kedge/launcher/bootguard"
	"kedge/server"
	"kedge/server/accountkeys"
	"kedge/server/bootstrap"
	"kedge/server/customkinds"
	"kedge/server/identity"
	"kedge/server/join"
	"kedge/server/kubeconfigs"
	"kedge/server/loopback"
	"kedge/server/membership"
	"kedge/server/peerrequests"
	"kedge/server/secretsencryption"
	"kedge/server/servicelb"
	"kedge/server/tunnels"
)

// controlPlane has the components of a server, made and connected, and not yet in a group. Of its node it has the kubelet.
type controlPlane struct {
	id        *identity.Identity
	loopback  *loopback.Loopback
	store     store
	own       *datastore.Store // the same, nil if it is an external etcd
	leads     membership.Leading
	members   *membership.Servers
	hostAddrs *kernelnet.AddressFollower
	joins     *join.Service
	users     *kubeconfigs.Kubeconfigs
	gate      *join.Gate
	hub       *tunnels.Hub
	api       *server.APIServer

	keeper     *secretsencryption.Keeper // of the keys of Secrets
	peers      *secretsencryption.Client
	encryption *secretsencryption.Administration // nil with an external etcd

	accounts    *accountkeys.Keeper // of the keys of service accounts' tokens
	accountKeys *server.AccountKeys // as they are used
	accountPeer *accountkeys.Client
	accountAdm  *accountkeys.Administration

	// Nil on a server without a node.
	kubelet    *agent.Kubelet
	nodeClient *rest.Config   // calls the API as the kubelet
	self       *remote.Node   // answers the servers
	volumes    *agent.Volumes // keeps the kubelet's volume plugins apart from the controllers'
}

// newControlPlane makes the components of a server. The kubelet is among them, since the hub of tunnels needs its address.
func newControlPlane(build Build, s Config, id *identity.Identity, owned *datadir.Dir, log *slog.Logger) (*controlPlane, error) {
	p := &controlPlane{id: id, loopback: loopback.New()}
	p.store, p.own = newStore(s, id, owned, log)
	p.leads = membership.Leading{Store: p.store}
	advertised := netip.AddrPortFrom(s.server.AdvertiseAddress, uint16(s.server.HTTPSPort))
	var err error
	if p.members, err = membership.New(s.NodeName, s.server.Dir, advertised, p.loopback, p.store, component(log, "servers")); err != nil {
		return nil, err
	}
	p.hostAddrs = kernelnet.NewAddressFollower(s.NodeIPs, s.findIPs, component(log, "addresses"))
	p.joins = newJoin(s.server, id, p.members, p.hostAddrs.Get, component(log, "join"))
	p.users = kubeconfigs.New(id.ClientCA, p.members.API())
	p.gate = p.joins.Gate(p.users, component(log, "gate"))
	var kubelet netip.AddrPort
	if s.parts.Node {
		p.volumes, p.nodeClient = agent.NewVolumes(p.leads), p.loopback.Config("system:node:"+s.NodeName, user.NodesGroup)
		if p.kubelet, err = agent.NewKubelet(s.agent, agent.Dependencies{
			Client: p.nodeClient, Addresses: p.hostAddrs.Get, Volumes: p.volumes,
			ServingCert: id.KubeletServing.CertFile, ServingKey: id.KubeletServing.KeyFile, ClientCA: id.ClientCA.CertFile(),
		}, component(log, "kubelet")); err != nil {
			return nil, err
		}
		kubelet = p.kubelet.Endpoint()
		p.self = self(build, s, log)
	}
	p.hub = newHub(s.server, p.joins, p.gate, kubelet, component(log, "tunnels"))
	p.newKeepers(s, log)
	if p.api, err = server.NewAPIServer(s.server, server.APIServerDependencies{
		Identity: id, Loopback: p.loopback, Leadership: p.store.Leadership, Joins: p.joins, Hub: p.hub, Gate: p.gate, Users: p.users, Encryption: p.keeper, Members: p.memberNames,
		Accounts: p.accounts, AccountKeys: p.accountKeys,
	}); err != nil {
		return nil, err
	}
	if p.own != nil {
		p.own.GuardPuts(p.api.SecretsPrefix(), p.keeper.Guard)
		p.encryption = secretsencryption.NewAdministration(p.keeper, p.peers, p.servers())
	}
	return p, nil
}

// newKeepers makes the keepers of the keys of Secrets and of service accounts' tokens, and their clients of the other servers.
func (p *controlPlane) newKeepers(s Config, log *slog.Logger) {
	ask := peerrequests.NewClient(p.id.ServerCA.Cert, servers.Host, p.id.Peer.CertFile, p.id.Peer.KeyFile)
	p.peers = secretsencryption.NewClient(ask)
	open := secretsencryption.Etcd(func() (*clientv3.Client, error) {
		c, err := p.store.NewClient()
		if err != nil {
			return nil, err
		}
		return c.Client, nil
	})
	p.keeper = secretsencryption.NewKeeper(s.NodeName, s.server.Dir, open, p.peers.File, component(log, "encryption"))
	p.accountKeys, p.accountPeer = server.NewAccountKeys(), accountkeys.NewClient(ask)
	opened := func() (accountkeys.Store, error) { return open() }
	p.accounts = accountkeys.NewKeeper(s.NodeName, s.server.Dir, opened, p.accountKeys, p.accountPeer, p.members.Names, component(log, "account-keys"))
	p.accountAdm = accountkeys.NewAdministration(p.accounts, p.accountPeer, accountkeys.Cluster(p.servers()), p.members.API())
}

// memberNames returns the names of the servers, without witnesses. That of one that was admitted and has not started is its ID.
func (p *controlPlane) memberNames(ctx context.Context) ([]string, error) {
	members, err := p.members.Members(ctx)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range members {
		if !m.Witness {
			names = append(names, m.Name)
		}
	}
	return names, nil
}

// servers is what the changes of keys know of the servers.
func (p *controlPlane) servers() secretsencryption.Cluster {
	return secretsencryption.Cluster{
		Members: p.members.Names,
		APIs: func() map[string]string {
			all, _ := p.members.Directory().Servers()
			apis := map[string]string{}
			for name, s := range all {
				apis[name] = s.API.String()
			}
			return apis
		},
	}
}

// movedTo is the server's configuration on a machine that has other addresses.
func (s Config) movedTo(addrs []netip.Addr) server.Config {
	sv := s.server
	sv.NodeIPs = addrs
	if !s.fixedAPI {
		sv.AdvertiseAddress = addrs[0]
	}
	return sv
}

// singleton is a component that runs on one server of the cluster at a time.
type singleton struct {
	name  string
	build func() (lifecycle.Component, error)
}

// stopWithin is how long singletons may take to stop when another server leads.
const stopWithin = 5 * time.Second

// singletons are the components that run on the leader. Their writes are refused as soon as its term has ended.
func singletons(s Config, p *controlPlane, log *slog.Logger) []singleton {
	var guard server.VolumesBuilder
	if p.volumes != nil {
		guard = p.volumes.Build
	}
	leader := p.loopback.While(p.leads)
	list := []singleton{
		{"controllers", func() (lifecycle.Component, error) {
			return server.NewControllers(s.server, p.id, p.accountKeys, leader, guard)
		}},
		{"scheduler", func() (lifecycle.Component, error) { return server.NewScheduler(s.server, leader) }},
		{"endpoints", func() (lifecycle.Component, error) {
			return p.members.NewEndpoints(leader, p.id, component(log, "endpoints"))
		}},
		{"account-keys", func() (lifecycle.Component, error) {
			return accountkeys.NewController(p.accounts, p.accountPeer, accountkeys.Cluster(p.servers()), component(log, "account-keys")), nil
		}},
	}
	if p.own != nil {
		list = append(list, singleton{"encryption", func() (lifecycle.Component, error) {
			return secretsencryption.NewController(p.keeper, p.peers, p.servers(), p.api.SecretsPrefix(), component(log, "encryption")), nil
		}})
	}
	if s.parts.Balancer {
		list = append(list, singleton{"servicelb", func() (lifecycle.Component, error) {
			return servicelb.New(s.balancer, leader.Config(bootstrap.LoadBalancerUser), component(log, "servicelb"))
		}})
	}
	if p.self != nil {
		list = append(list, singleton{"upgrades", func() (lifecycle.Component, error) { return newUpgrades(s, p, leader, log) }})
	}
	return list
}

// newUpgrades makes the controller that carries out Upgrades.
func newUpgrades(s Config, p *controlPlane, leader *loopback.Loopback, log *slog.Logger) (lifecycle.Component, error) {
	cfg := upgrades.Config{
		Own: s.NodeName, Dir: bootguard.Path(s.DataDir, "rollout"),
		Source:  appliance.Source{Base: cmp.Or(os.Getenv("KEDGE_URL"), appliance.DefaultReleases), Client: appliance.DownloadClient()},
		Keys:    func() ([]release.Key, error) { return release.Trusted(release.TrustedKeysFile) },
		Servers: p.memberNames,
		Dial: func(ctx context.Context, node string) (net.Conn, error) {
			if node == s.NodeName {
				return p.self.Conn(), nil
			}
			return p.hub.Node(ctx, node)
		},
		Define: func(ctx context.Context) error {
			client, err := dynamic.NewForConfig(leader.Config(bootstrap.UpgradesUser))
			if err != nil {
				return err
			}
			return customkinds.Kind{Definition: upgrades.Definition, Revision: upgrades.Revision, Resource: upgrades.Resource}.Define(ctx, client)
		},
	}
	return upgrades.New(cfg, leader.Config(bootstrap.UpgradesUser), component(log, "upgrades"))
}
