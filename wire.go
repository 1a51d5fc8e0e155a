package main

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"kedge/agent"
	"kedge/agent/uplink"
	"kedge/datastore"
	"kedge/datastore/hook"
	"kedge/dns"
	"kedge/internal/control"
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
	"kedge/server/loopback"
	"kedge/server/servicelb"
)

// wire is the whole graph: which parts there are and what each comes after.
func wire(group *lifecycle.Group, s settings, id *server.Identity, log *slog.Logger) error {
	lb := loopback.New()
	store := datastore.New(s.datastore, component(log, "datastore"))
	joins, err := server.NewJoin(s.server, id, lb, component(log, "join"))
	if err != nil {
		return err
	}
	hub := server.NewHub(s.server, joins, component(log, "tunnels"))
	api, err := server.NewAPIServer(s.server, id, lb, joins, hub)
	if err != nil {
		return err
	}
	controllers, err := server.NewControllers(s.server, id, lb)
	if err != nil {
		return err
	}
	scheduler, err := server.NewScheduler(s.server, lb)
	if err != nil {
		return err
	}
	if err := server.ApplyFeatureGates(); err != nil {
		return err
	}
	hook.Install(store)

	asked := control.NewServer(s.runDir, reporter(group, s.nodeName))
	group.Add(asked)
	answerJoin(asked, joins)
	hStore := group.Add(store)
	hAPI := group.Add(api, hStore)
	group.Add(hub, hAPI)
	group.Add(controllers, hAPI)
	group.Add(scheduler, hAPI)
	if s.balancer != nil {
		balancer, err := servicelb.New(*s.balancer, lb.Config(server.LoadBalancerUser), component(log, "servicelb"))
		if err != nil {
			return err
		}
		group.Add(balancer, hAPI)
	}
	if s.disableAgent {
		return nil
	}
	group.Add(server.NewRoles(s.server, lb, component(log, "roles")), hAPI)

	s.agent.Client = lb.Config("system:node:"+s.nodeName, user.NodesGroup)
	s.agent.ServingCert, s.agent.ServingKey = id.KubeletServing.CertFile, id.KubeletServing.KeyFile
	s.agent.ClientCA = id.ClientCA.CertFile()
	s.agent.Controllers = controllers.Built()
	return wireNode(group, s, node{
		asked: asked, api: hAPI, network: lb.Config(server.NetworkGroup+":"+s.nodeName, server.NetworkGroup),
		reach: func(kubelet netip.AddrPort) { hub.SetKubelet(kubelet) },
	}, log)
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
	certificate := func(file string) *servers.Certificate {
		return &servers.Certificate{CertFile: file, KeyFile: m.KeyFile()}
	}
	kubelet := certificate(m.ClientCertFile())
	s.agent.Client = overTLS(pool, kubelet, "kubelet")
	s.agent.ServingCert, s.agent.ServingKey = m.ServingCertFile(), m.KeyFile()
	s.agent.ClientCA = m.ClientCAFile()
	return wireNode(group, s, node{
		asked: asked, api: hMember, network: overTLS(pool, certificate(m.NetworkCertFile()), "network"),
		reach: func(listens netip.AddrPort) {
			c := uplink.Config{Cert: kubelet, Kubelet: listens, Ranges: slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs)}
			group.Add(uplink.New(c, list, pool, component(log, "tunnel")), hMember, hPool)
		},
		servers: func(named []string) {
			if err := list.Set(named); err != nil {
				component(log, "servers").Warn("the servers are not known after a restart", "err", err)
			}
		},
	}, log)
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
	// reach is told where the kubelet will listen, so that the API server can call it.
	reach func(kubelet netip.AddrPort)
	// servers is told the URLs of all servers, whenever they change; nil: nobody asks.
	servers func(urls []string)
}

// wireNode is the node's half.
func wireNode(group *lifecycle.Group, s settings, n node, log *slog.Logger) error {
	kubelet, err := agent.NewKubelet(s.agent, component(log, "kubelet"))
	if err != nil {
		return err
	}
	n.reach(kubelet.Endpoint())
	watches, err := agent.NewWatches(n.network)
	if err != nil {
		return err
	}
	if n.servers != nil {
		if err := watches.FollowServers(n.servers); err != nil {
			return err
		}
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
		rules = append(rules, services.Rules())
	}
	if s.backend.Mode != backend.None {
		rules = append(rules, pods.Rules()) // after services, which translate first
	}
	answerTrace(n.asked, explain.New(s.nodeName, s.nodeIPs, watches.Informers(), rules...))
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

func component(log *slog.Logger, name string) *slog.Logger { return log.With(logging.Component, name) }
