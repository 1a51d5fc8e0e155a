package main

import (
	"fmt"
	"log/slog"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"kedge/agent"
	"kedge/datastore"
	"kedge/datastore/hook"
	"kedge/dns"
	"kedge/internal/control"
	"kedge/internal/joining"
	"kedge/internal/lifecycle"
	"kedge/internal/logging"
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
	servers, err := server.NewServers(s.server, lb, store, component(log, "servers"))
	if err != nil {
		return err
	}
	joins := server.NewJoin(s.server, id, servers, component(log, "join"))
	api, err := server.NewAPIServer(s.server, id, lb, joins)
	if err != nil {
		return err
	}
	leads := server.Leading{Store: store}
	var volumes *agent.Volumes
	if !s.disableAgent {
		volumes = agent.NewVolumes(leads)
	}
	once, err := singletons(s, id, lb, servers, volumes, log)
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
	answerServers(asked, servers)
	hStore := group.Add(store)
	hAPI := group.Add(api, hStore)
	hList := group.Add(servers.Directory(), hAPI)
	for _, part := range once {
		group.Add(lifecycle.While(part.name, leads, stopWithin, part.build), hAPI, hList)
	}
	if s.disableAgent {
		return nil
	}
	group.Add(server.NewRoles(s.server, lb, servers.Directory(), component(log, "roles")), hAPI)

	s.agent.Client = lb.Config("system:node:"+s.nodeName, user.NodesGroup)
	s.agent.ServingCert, s.agent.ServingKey = id.KubeletServing.CertFile, id.KubeletServing.KeyFile
	s.agent.ClientCA = id.ClientCA.CertFile()
	s.agent.Volumes = volumes
	return wireNode(group, s, asked, hAPI, lb.Config(server.NetworkGroup+":"+s.nodeName, server.NetworkGroup), log)
}

// singleton is a part that runs on one server of the cluster at a time.
type singleton struct {
	name  string
	build func() (lifecycle.Component, error)
}

// stopWithin is how long singletons may take to stop when another server leads.
const stopWithin = 5 * time.Second

// singletons are the parts that run once in a cluster.
func singletons(s settings, id *server.Identity, lb *loopback.Loopback, servers *server.Servers, volumes *agent.Volumes, log *slog.Logger) ([]singleton, error) {
	var guard server.VolumesBuilder
	if volumes != nil {
		guard = volumes.Build
	}
	parts := []singleton{
		{"controllers", func() (lifecycle.Component, error) { return server.NewControllers(s.server, id, lb, guard) }},
		{"scheduler", func() (lifecycle.Component, error) { return server.NewScheduler(s.server, lb) }},
		{"endpoints", func() (lifecycle.Component, error) { return servers.NewEndpoints(id, component(log, "endpoints")), nil }},
	}
	if s.balancer != nil {
		parts = append(parts, singleton{"servicelb", func() (lifecycle.Component, error) {
			return servicelb.New(*s.balancer, lb.Config(server.LoadBalancerUser), component(log, "servicelb"))
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
func wireAgent(group *lifecycle.Group, s settings, m *joining.Member, log *slog.Logger) error {
	asked := control.NewServer(s.runDir, reporter(group, s.nodeName))
	group.Add(asked)
	refuseJoin(asked)
	hMember := group.Add(m)
	s.agent.Client = overTLS(m, m.ClientCertFile(), "kubelet")
	s.agent.ServingCert, s.agent.ServingKey = m.ServingCertFile(), m.KeyFile()
	s.agent.ClientCA = m.ClientCAFile()
	return wireNode(group, s, asked, hMember, overTLS(m, m.NetworkCertFile(), "network"), log)
}

// overTLS is how an agent calls the API as the user of one of its certificates. The
// files are read again when they change.
func overTLS(m *joining.Member, certFile, user string) *rest.Config {
	return &rest.Config{
		Host:            m.Server(),
		TLSClientConfig: rest.TLSClientConfig{CAFile: m.ServerCAFile(), CertFile: certFile, KeyFile: m.KeyFile()},
		QPS:             -1, // priority and fairness of the API server sees these requests, as it does a server's own
		UserAgent:       "kedge/" + user,
		ContentConfig: rest.ContentConfig{
			AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json",
			ContentType:        "application/vnd.kubernetes.protobuf",
		},
	}
}

// wireNode is the node's half. networkClient is how its data path reads the API.
func wireNode(group *lifecycle.Group, s settings, asked *control.Server, hAPI lifecycle.Handle, networkClient *rest.Config, log *slog.Logger) error {
	kubelet, err := agent.NewKubelet(s.agent, component(log, "kubelet"))
	if err != nil {
		return err
	}
	watches, err := agent.NewWatches(networkClient)
	if err != nil {
		return err
	}
	var policies *policy.Policy
	var judge cni.Judge // nil: every connection is allowed
	if s.policy != nil {
		clusterWide, err := dynamic.NewForConfig(networkClient)
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
	hWatches := group.Add(watches, hAPI)
	group.Add(ways, hWatches)
	beforeKubelet := []lifecycle.Handle{hAPI, hRuntime}
	var hPods lifecycle.Handle // used by policies, which there are only with it
	if s.backend.Mode != backend.None {
		hPods = group.Add(pods)
		beforeKubelet = append(beforeKubelet, hPods)
		group.Add(agent.NewRegistration(s.agent.Client, s.nodeName, pods.SetPodCIDRs, component(log, "registration")), hAPI, hPods)
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
	answerTrace(asked, explain.New(s.nodeName, s.nodeIPs, watches.Informers(), rules...))
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
