package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"kedge/agent"
	"kedge/agent/uplink"
	"kedge/datastore"
	"kedge/datastore/hook"
	"kedge/dns"
	"kedge/internal/calls"
	"kedge/internal/control"
	"kedge/internal/hostaddr"
	"kedge/internal/joining"
	"kedge/internal/lifecycle"
	"kedge/internal/logging"
	"kedge/internal/servers"
	"kedge/network"
	"kedge/network/backend"
	"kedge/network/cni"
	"kedge/network/explain"
	"kedge/network/loadbalancer"
	"kedge/network/policy"
	"kedge/network/proxy"
	"kedge/network/trace"
	"kedge/runtime"
	"kedge/server"
	"kedge/server/bootstrap"
	"kedge/server/identity"
	"kedge/server/loopback"
	"kedge/server/servicelb"
	"kedge/server/tunnels"
)

// wire is the whole graph: which parts there are and what each comes after.
func wire(group *lifecycle.Group, s settings, id *identity.Identity, log *slog.Logger) error {
	lb := loopback.New()
	store := datastore.New(s.datastore, component(log, "datastore"))
	others, err := server.NewServers(s.server, lb, store, component(log, "servers"))
	if err != nil {
		return err
	}
	moves := hostaddr.NewFollower(s.nodeIPs, s.findIPs, component(log, "addresses"))
	joins := server.NewJoin(s.server, id, others, moves.Get, component(log, "join"))
	gate := joins.Gate(component(log, "gate"))
	hub := server.NewHub(s.server, joins, gate, component(log, "tunnels"))
	api, err := server.NewAPIServer(s.server, id, lb, joins, gate, hub, store)
	if err != nil {
		return err
	}
	leads := server.Leading{Store: store}
	var volumes *agent.Volumes
	if !s.disableAgent {
		volumes = agent.NewVolumes(leads)
	}
	once, err := singletons(s, id, lb, others, volumes, log)
	if err != nil {
		return err
	}
	if err := server.ApplyFeatureGates(); err != nil {
		return err
	}
	hook.Install(store)

	asked := control.NewServer(s.runDir, reporter(group, s.nodeName))
	group.Add(asked)
	group.Add(moves)
	answerJoin(asked, joins)
	answerServers(asked, others)
	hStore := group.Add(store)
	group.Add(&leading{now: store.Leadership, log: component(log, "leadership")}, hStore)
	hAPI := group.Add(api, hStore)
	group.Add(hub, group.Add(gate, hAPI))
	hList := group.Add(others.Directory(), hAPI)
	caller := calls.NewCaller(id.ServerCA.Cert.Raw, uint16(s.server.HTTPSPort), hub.Missing, component(log, "calls"))
	group.Add(caller, hAPI)
	renewal := identity.NewRenewal(s.server.Identity(), id, component(log, "certificates"))
	group.Add(renewal)
	moves.Tell("the API's and the kubelet's certificates", func(addrs []netip.Addr) error {
		return renewal.Moved(s.movedTo(addrs).Identity(), time.Now())
	})
	moves.Tell("the store", func(addrs []netip.Addr) error { store.SetAddresses(addrs); return nil })
	moves.Tell("the list of servers", func(addrs []netip.Addr) error {
		sv := s.movedTo(addrs)
		others.Directory().SetAPI(netip.AddrPortFrom(sv.AdvertiseAddress, uint16(sv.HTTPSPort)))
		caller.Moved()
		return nil
	})
	for _, part := range once {
		group.Add(lifecycle.While(part.name, leads, stopWithin, part.build), hAPI, hList)
	}
	if s.disableAgent {
		return nil
	}
	group.Add(server.NewRoles(s.server, lb, others.Directory(), component(log, "roles")), hAPI)

	s.agent.Client = lb.Config("system:node:"+s.nodeName, user.NodesGroup)
	s.agent.ServingCert, s.agent.ServingKey = id.KubeletServing.CertFile, id.KubeletServing.KeyFile
	s.agent.ClientCA = id.ClientCA.CertFile()
	s.agent.Volumes = volumes
	return wireServersNode(group, s, node{
		asked: asked, api: hAPI, moves: moves, network: lb.Config(bootstrap.NetworkGroup+":"+s.nodeName, bootstrap.NetworkGroup),
	}, hub, others, id, log)
}

// movedTo are the server's settings on a machine that has other addresses.
func (s settings) movedTo(addrs []netip.Addr) server.Config {
	sv := s.server
	sv.NodeIPs = addrs
	if !s.fixedAPI {
		sv.AdvertiseAddress = addrs[0]
	}
	return sv
}

// wireServersNode is the node's half of a server. Its API is in memory; the other
// servers reach it as they reach any node.
func wireServersNode(group *lifecycle.Group, s settings, n node, hub *tunnels.Hub, others *server.Servers, id *identity.Identity, log *slog.Logger) error {
	list, err := servers.Load(filepath.Join(s.server.Dir, serversFile))
	if err != nil {
		return err
	}
	pool, err := servers.New(list, id.ServerCA.CertFile(), servers.DefaultTimes(), component(log, "servers"))
	if err != nil {
		return err
	}
	n.servers = remember(list, log)
	n.reach = func(listens netip.AddrPort) {
		hub.SetKubelet(listens)
		c := uplink.Config{
			Cert: &servers.Certificate{CertFile: id.NodeClient.CertFile, KeyFile: id.NodeClient.KeyFile}, Kubelet: listens,
			Ranges: slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs), Own: func() string { return others.URLs()[0] },
		}
		up := uplink.New(c, list, pool, component(log, "tunnel"))
		group.Add(up, n.api)
		n.moves.Tell("the tunnels", func([]netip.Addr) error { pool.Moved(hostaddr.Has); up.Moved(); return nil })
	}
	return wireNode(group, s, n, log)
}

// serversFile is the list of servers, in the directory of an agent or of a server.
const serversFile = "servers.json"

// remember keeps the servers that are named.
func remember(list *servers.List, log *slog.Logger) func(urls []string) {
	return func(urls []string) {
		if err := list.Set(urls); err != nil {
			component(log, "servers").Warn("the servers will not be known after a restart", "err", err)
		}
	}
}

// singleton is a part that runs on one server of the cluster at a time.
type singleton struct {
	name  string
	build func() (lifecycle.Component, error)
}

// stopWithin is how long singletons may take to stop when another server leads.
const stopWithin = 5 * time.Second

// singletons are the parts that run once in a cluster.
func singletons(s settings, id *identity.Identity, lb *loopback.Loopback, others *server.Servers, volumes *agent.Volumes, log *slog.Logger) ([]singleton, error) {
	var guard server.VolumesBuilder
	if volumes != nil {
		guard = volumes.Build
	}
	parts := []singleton{
		{"controllers", func() (lifecycle.Component, error) { return server.NewControllers(s.server, id, lb, guard) }},
		{"scheduler", func() (lifecycle.Component, error) { return server.NewScheduler(s.server, lb) }},
		{"endpoints", func() (lifecycle.Component, error) { return others.NewEndpoints(id, component(log, "endpoints")), nil }},
	}
	if s.balancer != nil {
		parts = append(parts, singleton{"servicelb", func() (lifecycle.Component, error) {
			return servicelb.New(*s.balancer, lb.Config(bootstrap.LoadBalancerUser), component(log, "servicelb"))
		}})
	}
	// What is wrong with a component's flags must be said before anything starts.
	if _, err := parts[0].build(); err != nil {
		return nil, err
	}
	if _, err := parts[1].build(); err != nil {
		return nil, err
	}
	return parts, nil
}

// wireAgent is the graph of a machine without a control plane: the node's half, and
// a way to the API that is made of TLS.
func wireAgent(group *lifecycle.Group, s settings, m *joining.Member, list *servers.List, log *slog.Logger) error {
	asked := control.NewServer(s.runDir, reporter(group, s.nodeName))
	group.Add(asked)
	refuseJoin(asked)
	pool, err := servers.New(list, m.ServerCAFile(), servers.DefaultTimes(), component(log, "servers"))
	if err != nil {
		return err
	}
	hMember := group.Add(m)
	hPool := group.Add(pool)
	moves := hostaddr.NewFollower(s.nodeIPs, s.towards(pool), component(log, "addresses"))
	group.Add(moves)
	group.Add(calls.NewListener(m.ServerCA(), func() bool { return pool.Check(context.Background()) != nil }, list.Ports, func(url string) {
		list.Hint(url)
		moves.Look() // which address leads there may be another
	}, component(log, "calls")))
	certificate := func(file string) *servers.Certificate {
		return &servers.Certificate{CertFile: file, KeyFile: m.KeyFile()}
	}
	kubelet := certificate(m.ClientCertFile())
	s.agent.Client = overTLS(pool, kubelet, "kubelet")
	s.agent.ServingCert, s.agent.ServingKey = m.ServingCertFile(), m.KeyFile()
	s.agent.ClientCA = m.ClientCAFile()
	return wireNode(group, s, node{
		asked: asked, api: hMember, moves: moves, network: overTLS(pool, certificate(m.NetworkCertFile()), "network"),
		reach: func(listens netip.AddrPort) {
			c := uplink.Config{Cert: kubelet, Kubelet: listens, Ranges: slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs)}
			up := uplink.New(c, list, pool, component(log, "tunnel"))
			group.Add(up, hMember, hPool)
			moves.Tell("the ways to the servers", func([]netip.Addr) error {
				pool.Moved(hostaddr.Has)
				up.Moved()
				m.Moved()
				return nil
			})
		},
		servers: remember(list, log),
	}, log)
}

// towards returns how the addresses of an agent are found: that from which it reaches the
// server in use goes before that of the default route.
func (s settings) towards(pool *servers.Pool) func() ([]netip.Addr, error) {
	if s.findIPs == nil {
		return nil
	}
	return func() ([]netip.Addr, error) {
		found, err := s.findIPs()
		if u, bad := url.Parse(pool.Current()); bad == nil {
			if far, bad := netip.ParseAddr(u.Hostname()); bad == nil {
				if a, ok := hostaddr.Towards(far); ok {
					found = prefer(found, a)
				}
			}
		}
		return found, err
	}
}

// overTLS is how an agent calls the API as the holder of a certificate.
func overTLS(pool *servers.Pool, cert *servers.Certificate, user string) *rest.Config {
	return &rest.Config{
		Host:      "https://" + servers.Host,
		Transport: pool.Transport(cert),
		QPS:       -1, // priority and fairness of the API server sees these requests, as it does a server's own
		UserAgent: "kedge/" + user,
		ContentConfig: rest.ContentConfig{
			AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json",
			ContentType:        "application/vnd.kubernetes.protobuf",
		},
	}
}

// node is what the node's half of a server and that of an agent are given.
type node struct {
	asked   *control.Server
	api     lifecycle.Handle // after which the API can be called
	network *rest.Config     // how the data path reads the API
	moves   *hostaddr.Follower
	// reach is told where the kubelet will listen, so that the API server can call it.
	reach func(kubelet netip.AddrPort)
	// servers is told the URLs of all servers, whenever they change.
	servers func(urls []string)
}

// wireNode is the node's half.
func wireNode(group *lifecycle.Group, s settings, n node, log *slog.Logger) error {
	s.agent.Addresses = n.moves.Get
	kubelet, err := agent.NewKubelet(s.agent, component(log, "kubelet"))
	if err != nil {
		return err
	}
	n.reach(kubelet.Endpoint())
	watches, err := agent.NewWatches(n.network)
	if err != nil {
		return err
	}
	if err := watches.FollowServers(n.servers); err != nil {
		return err
	}
	var policies *policy.Policy
	var judge cni.Judge // nil: every connection is allowed
	if s.policy != nil {
		clusterWide, err := dynamic.NewForConfig(n.network)
		if err != nil {
			return fmt.Errorf("make a client for cluster-wide policies: %w", err)
		}
		if policies, err = policy.New(*s.policy, watches.Informers(), clusterWide, component(log, "policy")); err != nil {
			return err
		}
		judge = policies
	}
	pods := network.New(s.network, judge, log)
	annotate, err := agent.Annotator(s.agent.Client, s.nodeName)
	if err != nil {
		return err
	}
	ways, err := backend.New(s.backend, watches.Informers(), annotate, pods.SetNodes, component(log, "backend"))
	if err != nil {
		return err
	}

	hRuntime := group.Add(runtime.New(s.runtime, log))
	group.Add(runtime.NewImages(s.runtime, log), hRuntime)
	hWatches := group.Add(watches, n.api)
	if err := wireAddresses(group, s, n, watches, hWatches, log); err != nil {
		return err
	}
	n.moves.Tell("the pods' network", pods.SetNodeIPs)
	group.Add(ways, hWatches)
	beforeKubelet := []lifecycle.Handle{n.api, hRuntime}
	var hPods lifecycle.Handle // used by policies, which there are only with it
	if s.backend.Mode != backend.None {
		hPods = group.Add(pods)
		beforeKubelet = append(beforeKubelet, hPods)
		group.Add(agent.NewRegistration(s.agent.Client, s.nodeName, pods.SetPodCIDRs, component(log, "registration")), n.api, hPods)
	}
	var rules []trace.Part
	if policies != nil {
		group.Add(policies, hWatches, hPods)
		rules = append(rules, policies)
	}
	if s.proxy != nil {
		services, err := proxy.New(*s.proxy, watches.Informers(), watches.Client(), component(log, "proxy"))
		if err != nil {
			return err
		}
		group.Add(services, hWatches)
		n.moves.Tell("services", func(addrs []netip.Addr) error { services.SetNodeIPs(addrs); return nil })
		rules = append(rules, services.Rules())
	}
	if s.backend.Mode != backend.None {
		rules = append(rules, pods.Rules()) // after services, which translate first
	}
	answerTrace(n.asked, explain.New(s.nodeName, n.moves.Get, watches.Informers(), rules...))
	if s.dns != nil {
		resolver, err := dns.New(*s.dns, watches.Informers(), watches.Client(), component(log, "dns"))
		if err != nil {
			return err
		}
		group.Add(resolver, hWatches)
	}
	if s.announcer != nil {
		announcer, err := loadbalancer.New(*s.announcer, watches.Informers(), watches.Client(), component(log, "loadbalancer"))
		if err != nil {
			return err
		}
		group.Add(announcer, hWatches)
	}
	group.Add(kubelet, beforeKubelet...)
	return nil
}

// wireAddresses has the node's object follow the machine's addresses.
func wireAddresses(group *lifecycle.Group, s settings, n node, watches *agent.Watches, hWatches lifecycle.Handle, log *slog.Logger) error {
	if s.agent.OthersAddresses() {
		return nil
	}
	said, err := agent.NewNodeAddresses(s.agent.Client, watches, s.nodeName, n.moves.Get, s.agent.ExternalIPs, component(log, "nodeaddresses"))
	if err != nil {
		return err
	}
	group.Add(said, hWatches)
	n.moves.Tell("the node's object", func([]netip.Addr) error { said.Look(); return nil })
	return nil
}

func component(log *slog.Logger, name string) *slog.Logger { return log.With(logging.Component, name) }
