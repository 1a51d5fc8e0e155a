package assembly

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"kedge/agent"
	"kedge/agent/nodeobject"
	"kedge/agent/uplink"
	"kedge/agent/watches"
	"kedge/appliance/remote"
	"kedge/datastore/hook"
	"kedge/dns"
	"kedge/internal/beacon"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/joining"
	"kedge/internal/kernelnet"
	"kedge/internal/lifecycle"
	"kedge/internal/logging"
	"kedge/internal/servers"
	"kedge/network"
	"kedge/network/backend"
	"kedge/network/cni"
	"kedge/network/loadbalancer"
	"kedge/network/policy"
	"kedge/network/proxy"
	"kedge/network/trace"
	"kedge/runtime"
	"kedge/server"
	"kedge/server/bootstrap"
	"kedge/server/identity"
	"kedge/server/manifests"
	"kedge/server/membership"
)

// wireServer is the graph of a server: which components run, and after which others each starts. Store and API are what a
// server is for. The components of its node, and those that only help others to find it, are added with AddRestarted:
// their failure must not end the control plane.
func wireServer(build Build, group *lifecycle.Group, s Config, id *identity.Identity, owned *datadir.Dir, log *slog.Logger) error {
	p, err := newControlPlane(build, s, id, owned, log)
	if err != nil {
		return err
	}
	// Both set variables of upstream's packages, before any component runs.
	if err := server.ApplyGlobalFlags(s.server); err != nil {
		return err
	}
	hook.Install(p.store)
	requests := control.NewServer(s.RunDir, reporter(build, group, s.NodeName))
	answerJoin(requests, p.joins)
	answerKubeconfigs(requests, p.users, p.joins, id)
	answerServers(requests, p.members)
	answerConnect(requests, p.hub)
	if p.own == nil {
		refuseOwnStore(requests, id.EncryptionConfig)
	} else {
		answerSnapshots(requests, p.own, s.DataDir)
		answerEncryption(requests, p.encryption)
	}
	answerAccountKeys(requests, p.accountAdm)

	group.Add(requests)
	group.AddRestarted(p.hostAddrs)
	hStore := group.Add(vital{p.store})
	group.Add(&leadership{now: p.store.Leadership, log: component(log, "leadership")}, hStore)
	hAPI := group.Add(p.api, hStore)
	group.Add(p.hub, group.Add(p.gate, hAPI))
	hList := group.Add(p.members.Directory(), hAPI)
	sender := beacon.NewSender(id.ServerCA.Cert.Raw, uint16(s.server.HTTPSPort), p.hub.Missing, component(log, "calls"))
	group.AddRestarted(sender, hAPI)
	renewal := identity.NewRenewal(s.server.Identity(), id, component(log, "certificates"))
	group.AddRestarted(renewal)
	answerServersCertificates(requests, renewal)
	for _, single := range singletons(s, p, log) {
		group.Add(lifecycle.While(single.name, p.leads, stopWithin, single.build), hAPI, hList)
	}
	if err := errors.Join(wireManifests(group, s, p, hAPI, log), wireSnapshots(group, requests, s, p, hAPI, log)); err != nil {
		return err
	}

	p.hostAddrs.OnChange("the API's and the kubelet's certificates", func(addrs []netip.Addr) error {
		return renewal.Moved(s.movedTo(addrs).Identity(), time.Now())
	})
	p.hostAddrs.OnChange("the store", func(addrs []netip.Addr) error { p.store.SetAddresses(addrs); return nil })
	p.hostAddrs.OnChange("the list of servers", func(addrs []netip.Addr) error {
		sv := s.movedTo(addrs)
		p.members.Directory().SetAPI(netip.AddrPortFrom(sv.AdvertiseAddress, uint16(sv.HTTPSPort)))
		sender.Moved()
		return nil
	})
	if !s.parts.Node {
		return nil
	}
	group.AddRestarted(membership.NewRoles(s.NodeName, p.loopback, p.members.Directory(), component(log, "roles")), hAPI)
	return wireServersNode(group, s, p, node{
		requests: requests, api: hAPI, hostAddrs: p.hostAddrs, kubelet: p.kubelet, client: p.nodeClient,
		network: p.loopback.Config(bootstrap.NetworkGroup+":"+s.NodeName, bootstrap.NetworkGroup),
	}, log)
}

// wireServersNode adds the node of a server. The node calls the API in memory; the other servers reach it through tunnels,
// as they reach every node.
func wireServersNode(group *lifecycle.Group, s Config, p *controlPlane, n node, log *slog.Logger) error {
	list, damaged, err := servers.Load(filepath.Join(s.server.Dir, serversFile))
	if err != nil {
		return err
	}
	if damaged != nil {
		component(log, "servers").Warn("the list of servers is damaged; it is created again", "err", damaged)
	}
	pool, err := servers.New(list, p.id.ServerCA.CertFile(), servers.DefaultTimes(), component(log, "servers"))
	if err != nil {
		return err
	}
	n.rememberServers = remember(list, log)
	up := uplink.New(uplink.Config{
		Cert: &servers.Certificate{CertFile: p.id.NodeClient.CertFile, KeyFile: p.id.NodeClient.KeyFile}, Kubelet: n.kubelet.Endpoint(),
		Ranges: slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs), Own: func() string { return p.members.URLs()[0] },
		Self: p.self.Conn,
	}, list, pool, component(log, "tunnel"))
	group.AddRestarted(up, n.api)
	n.hostAddrs.OnChange("the tunnels", func([]netip.Addr) error { pool.Moved(kernelnet.HasAddress); up.Reconnect(); return nil })
	return wireNode(group, s, n, log)
}

// self returns what this node answers to the servers.
func self(build Build, s Config, log *slog.Logger) *remote.Node {
	return &remote.Node{
		Name: s.NodeName, Version: build.Version, Launcher: s.network.Plugin, DataDir: s.DataDir, RunDir: s.RunDir, Flags: s.flags,
		Restart: func() { _ = syscall.Kill(os.Getpid(), syscall.SIGTERM) }, // as an administrator does; it cannot fail
		Log:     component(log, "upgrade"),
	}
}

// wireManifests adds what applies the manifests of the installed bundle, if there are any.
func wireManifests(group *lifecycle.Group, s Config, p *controlPlane, api lifecycle.Handle, log *slog.Logger) error {
	cfg := manifests.Config{Folder: filepath.Join(s.DataDir, "bundle", "current", "manifests"), Record: filepath.Join(s.server.Dir, "manifests.json")}
	if found, err := os.ReadDir(cfg.Folder); errors.Is(err, fs.ErrNotExist) || err == nil && len(found) == 0 {
		return nil
	}
	applier, err := manifests.New(cfg, p.loopback.Admin(), component(log, "manifests"))
	if err != nil {
		return err
	}
	group.AddRestarted(applier, api)
	return nil
}

// serversFile is the file with the list of servers, in the directory of an agent or of a server.
const serversFile = "servers.json"

// remember returns a function that stores the URLs of the servers in list.
func remember(list *servers.List, log *slog.Logger) func(urls []string) {
	return func(urls []string) {
		if err := list.Set(urls); err != nil {
			component(log, "servers").Warn("the list of servers could not be stored", "err", err)
		}
	}
}

// wireAgent is the graph of an agent: its node, and connections to the API servers over TLS.
func wireAgent(build Build, group *lifecycle.Group, s Config, m *joining.Member, list *servers.List, log *slog.Logger) error {
	requests := control.NewServer(s.RunDir, reporter(build, group, s.NodeName))
	group.Add(requests)
	refuseJoin(requests, "an agent")
	requests.HandleGet(control.ServersPath, func(context.Context, url.Values) (any, error) {
		return nil, errors.New("this machine is an agent; run the command on a server")
	})
	answerAgentsCertificates(requests, m)
	pool, err := servers.New(list, m.ServerCAFile(), servers.DefaultTimes(), component(log, "servers"))
	if err != nil {
		return err
	}
	hMember := group.AddRestarted(m)
	hPool := group.AddRestarted(pool)
	hostAddrs := kernelnet.NewAddressFollower(s.NodeIPs, s.towards(pool), component(log, "addresses"))
	group.AddRestarted(hostAddrs)
	group.AddRestarted(beacon.NewListener(m.ServerCA(), func() bool { return pool.Check(context.Background()) != nil }, list.Ports, func(url string) {
		list.Hint(url)
		hostAddrs.Refresh() // the source address for that server may differ
	}, component(log, "calls")))
	certificate := func(file string) *servers.Certificate {
		return &servers.Certificate{CertFile: file, KeyFile: m.KeyFile()}
	}
	kubeletCert := certificate(m.ClientCertFile())
	client := overTLS(pool, kubeletCert, "kubelet")
	kubelet, err := agent.NewKubelet(s.agent, agent.Dependencies{
		Client: client, Addresses: hostAddrs.Get,
		ServingCert: m.ServingCertFile(), ServingKey: m.KeyFile(), ClientCA: m.ClientCAFile(),
	}, component(log, "kubelet"))
	if err != nil {
		return err
	}
	up := uplink.New(uplink.Config{
		Cert: kubeletCert, Kubelet: kubelet.Endpoint(), Ranges: slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs),
		Self: self(build, s, log).Conn,
	}, list, pool, component(log, "tunnel"))
	group.AddRestarted(up, hMember, hPool)
	hostAddrs.OnChange("the routes to the servers", func([]netip.Addr) error {
		pool.Moved(kernelnet.HasAddress)
		up.Reconnect()
		m.Moved()
		return nil
	})
	return wireNode(group, s, node{
		requests: requests, api: hMember, hostAddrs: hostAddrs, kubelet: kubelet, client: client,
		network: overTLS(pool, certificate(m.NetworkCertFile()), "network"), rememberServers: remember(list, log),
		clientFrom: func(from netip.Addr, more []netip.Addr) *rest.Config {
			c := overTLS(pool, kubeletCert, "kubelet")
			c.Transport = pool.From(from, more, kubeletCert)
			return c
		},
	}, log)
}

// towards returns a function that returns the addresses of an agent: the source address for connections to the
// current server replaces that of the default route.
func (s Config) towards(pool *servers.Pool) func() ([]netip.Addr, error) {
	if s.findIPs == nil {
		return nil
	}
	return func() ([]netip.Addr, error) {
		found, err := s.findIPs()
		// A server that is known by its name has no effect here.
		if server, parsed := serverAddress(pool.Current()); parsed {
			if a, ok := kernelnet.AddressTowards(server); ok {
				found = prefer(found, a)
			}
		}
		return found, err
	}
}

// serverAddress returns the address in the URL of a server.
func serverAddress(text string) (netip.Addr, bool) {
	u, err := url.Parse(text)
	if err != nil {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(u.Hostname())
	return a, err == nil
}

// overTLS returns the client configuration with which an agent calls the API as the holder of a certificate.
func overTLS(pool *servers.Pool, cert *servers.Certificate, user string) *rest.Config {
	return &rest.Config{
		Host:      "https://" + servers.Host,
		Transport: pool.Transport(cert),
		QPS:       -1, // no client-side limit: API priority and fairness limits these requests, like those of a server's components
		UserAgent: "kedge/" + user,
		ContentConfig: rest.ContentConfig{
			AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json",
			ContentType:        "application/vnd.kubernetes.protobuf",
		},
	}
}

// node is what the node of a server and that of an agent are given.
type node struct {
	requests  *control.Server
	api       lifecycle.Handle // after which the API can be called
	client    *rest.Config     // calls the API as the kubelet
	network   *rest.Config     // calls the API as the node's data path
	hostAddrs *kernelnet.AddressFollower
	kubelet   *agent.Kubelet
	// rememberServers stores the URLs of all servers. It is called whenever they change.
	rememberServers func(urls []string)
	// clientFrom is how an agent's kubelet calls the API from one of the machine's addresses. Nil on a server.
	clientFrom func(from netip.Addr, more []netip.Addr) *rest.Config
}

// wireNode adds the components of a node. Each of them is restarted by itself.
func wireNode(group *lifecycle.Group, s Config, n node, log *slog.Logger) error {
	w, err := watches.New(n.network)
	if err != nil {
		return err
	}
	if err := w.FollowServers(n.rememberServers); err != nil {
		return err
	}
	policies, err := newPolicies(s, n, w, log)
	if err != nil {
		return err
	}
	var engine cni.PolicyEngine // nil: every connection is allowed
	if policies != nil {
		engine = policies
	}
	pods := network.New(s.network, engine, log)
	annotate, err := nodeobject.Annotator(n.client, s.NodeName)
	if err != nil {
		return err
	}
	routes, err := backend.New(s.backend, w.Informers(), annotate, pods.SetNodes, component(log, "backend"))
	if err != nil {
		return err
	}

	hRuntime := group.AddRestarted(runtime.New(s.runtime, log))
	group.AddRestarted(runtime.NewImages(s.runtime, log), hRuntime)
	hWatches := group.AddRestarted(w, n.api)
	if err := wireAddresses(group, s, n, w, hWatches, log); err != nil {
		return err
	}
	n.hostAddrs.OnChange("the pods' network", pods.SetNodeIPs)
	group.AddRestarted(routes, hWatches)
	beforeKubelet := []lifecycle.Handle{n.api, hRuntime}
	var rules []trace.Part
	if s.parts.PodNetwork {
		hPods := group.AddRestarted(pods)
		beforeKubelet = append(beforeKubelet, hPods)
		group.AddRestarted(nodeobject.NewRegistration(n.client, s.NodeName, pods.SetPodCIDRs, component(log, "registration")), n.api, hPods)
		if policies != nil {
			group.AddRestarted(policies, hWatches, hPods)
			rules = append(rules, policies)
		}
	}
	if s.parts.Services {
		services, err := proxy.New(s.proxy, w.Informers(), w.Client(), component(log, "proxy"))
		if err != nil {
			return err
		}
		group.AddRestarted(services, hWatches)
		n.hostAddrs.OnChange("services", func(addrs []netip.Addr) error { services.SetNodeIPs(addrs); return nil })
		rules = append(rules, services.Rules())
	}
	if s.parts.PodNetwork {
		rules = append(rules, pods.Rules(), pods.Firewall()) // after services, which translate addresses first
	}
	answerTrace(n.requests, trace.New(s.NodeName, n.hostAddrs.Get, w.Informers(), rules...))
	if s.parts.DNS {
		resolver, err := dns.New(s.dns, w.Informers(), w.Client(), component(log, "dns"))
		if err != nil {
			return err
		}
		group.AddRestarted(resolver, hWatches)
	}
	if s.parts.Announcer {
		announcer, err := loadbalancer.New(s.announcer, w.Informers(), w.Client(), component(log, "loadbalancer"))
		if err != nil {
			return err
		}
		group.AddRestarted(announcer, hWatches)
	}
	group.AddRestarted(n.kubelet, beforeKubelet...)
	return nil
}

// newPolicies returns the policy engine, nil if another program enforces policies.
func newPolicies(s Config, n node, w *watches.Watches, log *slog.Logger) (*policy.Policy, error) {
	if !s.parts.Policies {
		return nil, nil
	}
	clusterWide, err := dynamic.NewForConfig(n.network)
	if err != nil {
		return nil, fmt.Errorf("create a client for cluster-wide policies: %w", err)
	}
	return policy.New(s.policy, w.Informers(), clusterWide, component(log, "policy"))
}

// wireAddresses has the node's object follow the machine's addresses.
func wireAddresses(group *lifecycle.Group, s Config, n node, w *watches.Watches, hWatches lifecycle.Handle, log *slog.Logger) error {
	addresses, err := nodeobject.NewAddresses(n.client, w.Informers(), s.NodeName, nodeobject.Machine{
		Internal: n.hostAddrs.Get, External: s.agent.ExternalIPs, Others: s.agent.AddressSourceOverridden(), Has: kernelnet.HasAddress, From: n.clientFrom,
	}, component(log, "nodeaddresses"))
	if err != nil {
		return err
	}
	group.AddRestarted(addresses, hWatches)
	n.hostAddrs.OnChange("the node's object", func([]netip.Addr) error { addresses.Refresh(); return nil })
	return nil
}

func component(log *slog.Logger, name string) *slog.Logger { return log.With(logging.Component, name) }
