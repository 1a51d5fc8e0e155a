package doctor

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/hostfirewall"
	"kedge/internal/lifecycle"
	"kedge/preflight"
)

var now = time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)

// healthy is a server that runs.
func healthy() *subject {
	return &subject{
		Config: Config{
			Version: "v1", DataDir: "/var/lib/kedge", RunDir: "/run/kedge", NodeName: "edge", Kubeconfig: "/etc/kedge/kubeconfig", Overhead: 50, Store: true,
			Preflight: preflight.Config{OwnLinks: "kdg1", BuildDate: now.AddDate(0, -1, 0), DNS: []netip.Addr{netip.MustParseAddr("10.43.0.10")}},
		},
		now: now, state: Running, unit: true, report: control.Report{Version: "v1", Node: "edge", PID: 77, Started: now.Add(-time.Hour)},
	}
}

// found runs a judge over facts.
func found[F any](judge func(*subject, F) []Finding, facts F, change ...func(*subject)) func() []Finding {
	return func() []Finding {
		s := healthy()
		for _, c := range change {
			c(s)
		}
		return judge(s, facts)
	}
}

func stopped(s *subject) { s.state, s.alive = Stopped, now.Add(-time.Hour) }

// judgements are facts and what they mean. want is the level, and texts that the line of the finding has in this order;
// empty for no finding.
type judgement struct {
	what string
	find func() []Finding
	want []string
}

func sysctls(pairs ...string) forwarding {
	f := forwarding{sysctls: map[string]string{ipForward: "1", "net/ipv4/conf/all/rp_filter": "2"}, links: []string{"kdg1abc"}, pods: 1}
	for i := 0; i < len(pairs); i += 2 {
		f.sysctls[pairs[i]] = pairs[i+1]
	}
	return f
}

func machineJudgements() []judgement {
	const gib = 1 << 30
	v6, none := sysctls(ip6Forward, "0"), sysctls(ipForward, "0")
	v6.ipv6, none.pods = true, 0
	foreign := func(s *subject) { s.ForeignNetwork = true }
	return []judgement{
		{"forwards", found(judgeForwarding, sysctls()), nil},
		{"ip_forward", found(judgeForwarding, sysctls(ipForward, "0")), []string{"PROBLEM", "net.ipv4.ip_forward: ", "is 0", "; sysctl -w net.ipv4.ip_forward=1"}},
		{"ip_forward with pods of a stopped kedge", found(judgeForwarding, sysctls(ipForward, "0"), stopped), []string{"PROBLEM", "net.ipv4.ip_forward"}},
		{"ip_forward before the start", found(judgeForwarding, none, stopped), nil},
		{"IPv6 forwarding", found(judgeForwarding, v6), []string{"PROBLEM", "net.ipv6.conf.all.forwarding is 0"}},
		{"IPv6 forwarding without IPv6", found(judgeForwarding, sysctls(ip6Forward, "0")), nil},
		{"rp_filter of all", found(judgeForwarding, sysctls("net/ipv4/conf/all/rp_filter", "1")), []string{"WARNING", "rp_filter", "on kdg1abc", "rp_filter=2"}},
		{"rp_filter of a link", found(judgeForwarding, sysctls("net/ipv4/conf/all/rp_filter", "0", "net/ipv4/conf/kdg1abc/rp_filter", "1")), []string{"WARNING", "rp_filter"}},
		{"rp_filter of a link, loose for all", found(judgeForwarding, sysctls("net/ipv4/conf/kdg1abc/rp_filter", "1")), nil},
		{"bridges of another network", found(judgeForwarding, sysctls(bridgeCall, "0"), foreign), []string{"WARNING", "bridge-nf-call-iptables=1"}},
		{"bridges of this network", found(judgeForwarding, sysctls(bridgeCall, "0")), nil},

		{"clock", found(judgeClock, clock{now: now, synced: true}), nil},
		{"clock of the past", found(judgeClock, clock{now: time.Unix(0, 0), synced: true}), []string{"PROBLEM", "1970-01-01", "built on 2026-10-29", "date -s"}},
		{"clock was set back", found(judgeClock, clock{now: now, synced: true}, func(s *subject) { s.datadir = datadir.Description{LastSeen: now.AddDate(0, 0, 3)} }), []string{"PROBLEM", "has seen 2026-12-02", "set back"}},
		{"no time service", found(judgeClock, clock{now: now}), []string{"WARNING", "no known time service", "chrony"}},
		{"a time service without a server", found(judgeClock, clock{now: now, daemon: "chronyd", maxError: time.Second}), []string{"WARNING", "chronyd runs, and has not synchronized", "1s"}},

		{"cgroup", found(judgeCgroup, cgroupFacts{root: "/kedge-edge"}), nil},
		{"cgroup removed", found(judgeCgroup, cgroupFacts{root: "/kedge-edge", missing: []string{"memory"}}), []string{"PROBLEM", "/kedge-edge", "lacks memory", "systemctl restart kedge"}},

		{"memory", found(judgeMemory, memory{total: 8 * gib, available: 4 * gib, pressure: true}), nil},
		{"all wait for memory", found(judgeMemory, memory{total: 8 * gib, available: 4 * gib, pressure: true, some: 40, full: 15}), []string{"PROBLEM", "15 %", "top pods"}},
		{"some wait for memory", found(judgeMemory, memory{total: 8 * gib, available: 4 * gib, pressure: true, some: 25, full: 5}), []string{"WARNING", "25 %"}},
		{"no pressure is measured, memory is short", found(judgeMemory, memory{total: 8 * gib, available: gib / 8}), []string{"PROBLEM", "128 MiB of 8.0 GiB"}},
		{"memory is low", found(judgeMemory, memory{total: 8 * gib, available: gib / 2}), []string{"WARNING", "512 MiB"}},
		{"no total", found(judgeMemory, memory{}), []string{"UNKNOWN", "MemTotal"}},

		{"limits", found(judgeLimits, limits{files: use{10, 100}, allFiles: use{10, 1 << 63}, instances: use{1, 128}, watches: use{1, 8192}}), nil},
		{"open files", found(judgeLimits, limits{files: use{85, 100}}), []string{"WARNING", "open-files", "85 of 100", "LimitNOFILE"}},
		{"files of all", found(judgeLimits, limits{allFiles: use{99, 100}}), []string{"PROBLEM", "fs.file-max=200"}},
		{"inotify instances", found(judgeLimits, limits{instances: use{127, 128}}), []string{"PROBLEM", "inotify: 127 of 128", "max_user_instances=8192"}},
		{"inotify watches", found(judgeLimits, limits{watches: use{500000, 524288}}), []string{"PROBLEM", "max_user_watches=1048576"}},
		{"conntrack", found(judgeConntrack, use{10, 100}), nil},
		{"conntrack fills", found(judgeConntrack, use{81, 100}), []string{"WARNING", "81 of 100", "nf_conntrack_max=200"}},
		{"conntrack is full", found(judgeConntrack, use{100, 100}), []string{"PROBLEM", "100 of 100"}},
	}
}

func networkJudgements() []judgement {
	a := netip.MustParseAddr
	port := func(flag string) Port {
		return Port{preflight.Port{Number: 6443, Protocol: "tcp", Purpose: "API server"}, flag}
	}
	chain := hostfirewall.Drop{Family: "inet", Table: "firewalld", Chain: "filter_FORWARD", Hook: hostfirewall.Forward}
	perhaps := chain
	perhaps.Perhaps = true
	return []judgement{
		{"name servers", found(judgeNameServers, nameServers{file: "/r", list: []netip.Addr{a("192.0.2.1")}}), nil},
		{"no name server", found(judgeNameServers, nameServers{file: "/r"}), []string{"WARNING", "/r has no name server", "--resolv-conf"}},
		{"the cluster's DNS", found(judgeNameServers, nameServers{file: "/r", list: []netip.Addr{a("10.43.0.10")}, own: []netip.Addr{a("10.43.0.10")}}), []string{"PROBLEM", "/r has 10.43.0.10", "circle"}},
		{"a resolver of this machine", found(judgeNameServers, nameServers{file: "/r", list: []netip.Addr{a("127.0.0.53")}, used: true}), nil},
		{"a resolver of this machine that is away", found(judgeNameServers, nameServers{file: "/r", list: []netip.Addr{a("127.0.0.53")}}), []string{"PROBLEM", "127.0.0.53", "systemd-resolved"}},

		{"own port", found(judgePorts, []heldPort{{port("--https-listen-port"), 77, "kedge", true}}), nil},
		{"port of another", found(judgePorts, []heldPort{{port("--https-listen-port"), 123, "nginx", false}}), []string{"PROBLEM", "port 6443/tcp: the port of the API server is in use by nginx (process 123)", "stop nginx, or choose another port with --https-listen-port"}},
		{"port of another kedge", found(judgePorts, []heldPort{{port(""), 123, "kedge", false}}), []string{"PROBLEM", "kedge (process 123), which has another run directory"}},
		{"port of nobody", found(judgePorts, []heldPort{{Port: port("")}}), []string{"PROBLEM", "not visible", "ss -lntup"}},

		{"firewall", found(judgeFirewall, firewall{legacy: []legacyChain{{"FORWARD", false, 9}}}), nil},
		{"firewall drops pods", found(judgeFirewall, firewall{pods: []hostfirewall.Drop{chain}}), []string{"PROBLEM", "firewall: packets of pods are dropped: chain filter_FORWARD of nftables table inet firewalld", "interfaces kdg1*", "nft list chain inet firewalld filter_FORWARD"}},
		{"firewall may drop pods", found(judgeFirewall, firewall{pods: []hostfirewall.Drop{perhaps}}), []string{"WARNING", "may drop"}},
		{"firewall drops a port", found(judgeFirewall, firewall{ports: map[string][]hostfirewall.Drop{"port 6443/tcp (API server)": {chain}}}), []string{"WARNING", "other machines to port 6443/tcp (API server) are dropped"}},
		{"iptables-legacy", found(judgeFirewall, firewall{legacy: []legacyChain{{"FORWARD", true, 0}}}), []string{"PROBLEM", "chain FORWARD of iptables-legacy drops packets of pods by policy; iptables-legacy -I FORWARD -o kdg1+"}},
		{"iptables-legacy with rules", found(judgeFirewall, firewall{legacy: []legacyChain{{"INPUT", true, 2}}}), []string{"WARNING", "INPUT", "unless one of its 2 rules"}},

		{"MTU", found(judgeMTU, mtus{link{"eth0", 1500}, []link{{"kedge-1", 1450}}, []link{{"kdg1a", 1450}}}), nil},
		{"MTU without tunnels", found(judgeMTU, mtus{link{"eth0", 1500}, nil, []link{{"kdg1a", 1500}}}), nil},
		{"MTU of the machine has shrunk", found(judgeMTU, mtus{link{"eth0", 1400}, []link{{"kedge-1", 1450}}, nil}), []string{"PROBLEM", "kedge-1 has an MTU of 1450, and eth0 one of 1400, of which the tunnel needs 50", "ip link set eth0 mtu 1500"}},
		{"MTU of pods", found(judgeMTU, mtus{link{"eth0", 1400}, nil, []link{{"kdg1a", 1450}, {"kdg1b", 1400}}}), []string{"WARNING", "the links of 1 pod (kdg1a)", "1400 that fit through eth0"}},
	}
}

func storageJudgements() []judgement {
	const gib = 1 << 30
	data := func(d disk) []disk { d.dir = "/var/lib/kedge"; return []disk{d} }
	writes := func(most, worst time.Duration) syncs {
		s := syncs{}
		for range 97 {
			s.took = append(s.took, most)
		}
		return syncs{took: append(s.took, worst, worst, worst)}
	}
	cert := func(begin, end time.Time, ca bool) certificates {
		return certificates{list: []certificate{{"/var/lib/kedge/server/tls/api.crt", "kube-apiserver", begin.AddDate(-10, 0, 0), end, begin, ca}}}
	}
	day := 24 * time.Hour
	return []judgement{
		{"disk", found(judgeDisks, data(disk{size: 100 * gib, free: 50 * gib, inodes: 100, inodesF: 50})), nil},
		{"disk without inodes", found(judgeDisks, data(disk{size: 100 * gib, free: 50 * gib})), nil},
		{"disk full", found(judgeDisks, data(disk{size: 100 * gib, free: 1 << 20})), []string{"PROBLEM", "disk /var/lib/kedge: only 1 MiB of 100 GiB", "no changes but deletions", "du -xh"}},
		{"disk nearly full", found(judgeDisks, data(disk{size: 100 * gib, free: 100 << 20})), []string{"PROBLEM", "pods evicted"}},
		{"disk small", found(judgeDisks, data(disk{size: 4 * gib, free: gib})), []string{"WARNING", "a few images"}},
		{"disk below the kubelet's threshold", found(judgeDisks, data(disk{size: 100 * gib, free: 10 * gib})), []string{"WARNING", "less than 15 %"}},
		{"a small run directory", found(judgeDisks, []disk{{dir: "/run/kedge", size: gib, free: gib / 2}}), nil},
		{"a full run directory", found(judgeDisks, []disk{{dir: "/run/kedge", size: gib, free: 1 << 20}}), []string{"PROBLEM", "disk /run/kedge"}},
		{"inodes are out", found(judgeDisks, data(disk{size: 100 * gib, free: 50 * gib, inodes: 1000, inodesF: 5})), []string{"PROBLEM", "5 of 1000 inodes"}},
		{"inodes are few", found(judgeDisks, data(disk{size: 100 * gib, free: 50 * gib, inodes: 1000, inodesF: 40})), []string{"WARNING", "40 of 1000 inodes"}},
		{"read-only", found(judgeDisks, data(disk{size: 100 * gib, free: 50 * gib, readOnly: true})), []string{"PROBLEM", "read-only", "remount"}},

		{"syncs", found(judgeSync, writes(time.Millisecond, 20*time.Millisecond)), nil},
		{"slow syncs", found(judgeSync, writes(time.Millisecond, 80*time.Millisecond)), []string{"WARNING", "take 1ms (half of 100) and 80ms (99 %): each change", "iostat"}},
		{"slow syncs of an agent", found(judgeSync, writes(30*time.Millisecond, 40*time.Millisecond), func(s *subject) { s.Store = false }), []string{"WARNING", "pods start slowly"}},
		{"very slow syncs", found(judgeSync, writes(200*time.Millisecond, 300*time.Millisecond)), []string{"PROBLEM", "lose their leadership"}},
		{"a stall", found(judgeSync, syncs{pending: 2 * time.Second}), []string{"PROBLEM", "did not finish within 2s", "dmesg"}},

		{"certificate", found(judgeCertificates, cert(now.Add(-day), now.Add(300*day), false)), nil},
		{"expired", found(judgeCertificates, cert(now.Add(-300*day), now.Add(-3*day), false)), []string{"PROBLEM", "certificate server/tls/api.crt: the certificate of kube-apiserver has expired (since 2026-11-26T12:00:00Z, 3 days ago); systemctl restart kedge"}},
		{"expired while kedge is stopped", found(judgeCertificates, cert(now.Add(-300*day), now.Add(-3*day), false), stopped), []string{"PROBLEM", "; start kedge: it renews"}},
		{"an authority expired", found(judgeCertificates, cert(now.Add(-300*day), now.Add(-3*day), true)), []string{"PROBLEM", "backup"}},
		{"of a short life", found(judgeCertificates, cert(now.Add(-time.Minute), now.Add(time.Hour), false)), nil},
		{"not renewed", found(judgeCertificates, cert(now.Add(-360*day), now.Add(5*day), false)), []string{"WARNING", "expires in 5 days", "2026-12-04"}},
		{"of the future", found(judgeCertificates, cert(now.AddDate(10, 0, 1), now.AddDate(11, 0, 0), false)), []string{"PROBLEM", "valid only from", "set the clock"}},
		{"damaged", found(judgeCertificates, certificates{damaged: []string{"/var/lib/kedge/server/tls/api.crt"}}), []string{"PROBLEM", "server/tls/api.crt: the file cannot be read"}},
	}
}

func runningJudgements() []judgement {
	one := func(c lifecycle.Status) []lifecycle.Status { return []lifecycle.Status{c} }
	joins := func(text string) func(*subject) {
		return func(s *subject) { s.Joins, s.TokenError = true, text }
	}
	nothing := struct{}{}
	return []judgement{
		{"runs", found(judgeProcess, nothing), nil},
		{"stopped", found(judgeProcess, nothing, stopped), []string{"PROBLEM", "kedge: kedge is not running (since 2026-11-29T11:00:00Z, 1h0m ago); systemctl start kedge; journalctl -u kedge has the reason"}},
		{"never started", found(judgeProcess, nothing, func(s *subject) { s.state = Absent }), nil},
		{"does not answer", found(judgeProcess, nothing, func(s *subject) { s.state, s.silent = Stopped, errors.New("timeout") }), []string{"PROBLEM", "does not answer at /run/kedge/kedge.sock: timeout"}},
		{"another version", found(judgeProcess, nothing, func(s *subject) { s.Version = "v2" }), []string{"WARNING", "the running kedge is v1, and this program is v2", "restart"}},
		{"wrong settings", found(judgeSettings, nothing, func(s *subject) { s.SettingsError = errors.New("--node-ip: bad\n--x: bad") }), []string{"PROBLEM", "kedge does not start: --node-ip: bad --x: bad"}},
		{"no token", found(judgeJoin, joinFacts{}, joins("no join token is given")), []string{"PROBLEM", "cannot: no join token", "kedge token create"}},
		{"the server is away", found(judgeJoin, joinFacts{errors.New("ask https://s:6443: no route to host")}, joins("")), []string{"PROBLEM", "cannot: ask https://s:6443: no route", "see that the server runs"}},
		{"a good token, as far as can be seen", found(judgeJoin, joinFacts{}, joins("")), []string{"WARNING", "has not joined its cluster yet", "kedge token ls"}},

		{"ready", found(judgeComponents, one(lifecycle.Status{Name: "dns", State: lifecycle.Ready})), nil},
		{"ready with a problem", found(judgeComponents, one(lifecycle.Status{Name: "dns", State: lifecycle.Ready, Error: "loops"})), []string{"PROBLEM", "component dns: loops", "kedge status"}},
		{"restarted just now", found(judgeComponents, one(lifecycle.Status{Name: "dns", State: lifecycle.Ready, Restarts: 3, LastError: "bang", FailedAt: now.Add(-time.Minute)})), []string{"WARNING", "failed 3 times, last with: bang (since 2026-11-29T11:59:00Z"}},
		{"restarted long ago", found(judgeComponents, one(lifecycle.Status{Name: "dns", State: lifecycle.Ready, Restarts: 3, LastError: "bang", FailedAt: now.Add(-time.Hour)})), nil},
		{"restarting", found(judgeComponents, one(lifecycle.Status{Name: "dns", State: lifecycle.Restarting, Error: "bang", Since: now.Add(-time.Second)})), []string{"PROBLEM", "it is restarting: bang (since"}},
		{"starts", found(judgeComponents, one(lifecycle.Status{Name: "dns", State: lifecycle.Starting, Since: now.Add(-time.Second)})), []string{"WARNING", "it is starting", "wait"}},
		{"cannot join", found(judgeComponents, one(lifecycle.Status{Name: "join", State: lifecycle.Starting, Since: now.Add(-time.Hour), Detail: "the server is away"})), []string{"PROBLEM", "component join: it is starting: the server is away (since"}},
		{"hangs", found(judgeComponents, []lifecycle.Status{{Name: "dns", State: lifecycle.Waiting, Since: now.Add(-time.Hour), After: []string{"api"}}, {Name: "api", State: lifecycle.Ready}}), []string{"PROBLEM", "it is waiting (since"}},

		{"servers", found(judgeServers, []control.ListedServer{{Name: "a", Reachable: true}}), nil},
		{"a server is away", found(judgeServers, []control.ListedServer{{Name: "b", Addresses: []string{"192.0.2.2"}, LastSeen: now.Add(-time.Minute)}}), []string{"PROBLEM", "server b: it does not answer at 192.0.2.2 (since", "kedge server remove b"}},

		{"machine", found(judgePreflight, []preflight.Result{{Check: "cgroups", Level: preflight.OK}}), nil},
		{"machine with a warning", found(judgePreflight, []preflight.Result{{Check: "cgroups", Level: preflight.Warning, Message: "version 1", Remedy: "boot"}}), []string{"WARNING", "cgroups: version 1; boot"}},
		{"machine with an error", found(judgePreflight, []preflight.Result{{Check: "nftables", Level: preflight.Error, Message: "none", Remedy: "kernel"}}), []string{"PROBLEM", "nftables: none; kernel"}},
		{"limits of the shell", found(judgePreflight, []preflight.Result{{Check: "open-files", Level: preflight.Warning}}), nil},
		{"machine, found by another check", found(judgePreflight, []preflight.Result{{Check: "ports", Level: preflight.Error}}), nil},
	}
}

func pod(change func(*corev1.Pod)) cluster {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", CreationTimestamp: metav1.NewTime(now.Add(-time.Hour))}}
	p.Status.Phase = corev1.PodPending
	change(&p)
	return cluster{pods: []corev1.Pod{p}}
}

func waits(reason, message string) cluster {
	return pod(func(p *corev1.Pod) {
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", Image: "registry.example/web:2", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}
	})
}

func node(name, version string, kind corev1.NodeConditionType, status corev1.ConditionStatus) corev1.Node {
	n := corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	n.Status.NodeInfo.KubeletVersion = version
	n.Status.Conditions = []corev1.NodeCondition{{Type: kind, Status: status, Message: "because", LastTransitionTime: metav1.NewTime(now.Add(-time.Minute))}}
	return n
}

func clusterJudgements() []judgement {
	ready := node("a", "v1.37.1", corev1.NodeReady, corev1.ConditionTrue)
	onNode := waits("CreateContainerConfigError", "no secret")
	onNode.pods[0].Spec.NodeName = "b"
	onNode.nodes = []corev1.Node{node("b", "v1", corev1.NodeReady, corev1.ConditionUnknown)}
	many := cluster{}
	for range mostFindings + 5 {
		many.pods = append(many.pods, waits("RunContainerError", "bang").pods...)
	}
	two := cluster{pods: append(waits("ImagePullBackOff", "").pods, waits("ErrImagePull", "not found").pods...)}
	two.pods[1].Name = "web2"
	return []judgement{
		{"cluster", found(judgeCluster, cluster{nodes: []corev1.Node{ready}}), nil},
		{"node is not ready", found(judgeCluster, cluster{nodes: []corev1.Node{node("a", "v1", corev1.NodeReady, corev1.ConditionFalse)}}), []string{"PROBLEM", "node a: the node is NotReady: because (since 2026-11-29T11:59:00Z, 1m0s ago)"}},
		{"node is away, and its pods are no findings", found(judgeCluster, onNode), []string{"PROBLEM", "node b: the node is NotReady: it does not report"}},
		{"node lacks room", found(judgeCluster, cluster{nodes: []corev1.Node{node("a", "v1", corev1.NodeDiskPressure, corev1.ConditionTrue)}}), []string{"WARNING", "DiskPressure: because"}},
		{"versions", found(judgeCluster, cluster{nodes: []corev1.Node{ready, node("b", "v1.36.0", corev1.NodeReady, corev1.ConditionTrue)}}), []string{"WARNING", "versions: the nodes run different versions: v1.36.0 on b; v1.37.1 on a"}},
		{"unschedulable", found(judgeCluster, pod(func(p *corev1.Pod) {
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Reason: corev1.PodReasonUnschedulable, Message: "0/1 nodes are available: 1 Insufficient memory.", LastTransitionTime: metav1.NewTime(now.Add(-time.Minute))}}
		})), []string{"PROBLEM", "pod shop/web: no node takes the pod (Unschedulable): 0/1 nodes are available: 1 Insufficient memory. (since", "describe pod -n shop web"}},
		{"an image, wanted by two pods", found(judgeCluster, two), []string{"PROBLEM", "image registry.example/web:2: the image cannot be pulled, and pods wait for it (shop/web, shop/web2): not found (since", "kedge images pull registry.example/web:2"}},
		{"a missing secret", found(judgeCluster, waits("CreateContainerConfigError", `secret "s" not found`)), []string{"PROBLEM", `container c does not start (CreateContainerConfigError): secret "s" not found`}},
		{"crashes", found(judgeCluster, waits("CrashLoopBackOff", "")), []string{"PROBLEM", "CrashLoopBackOff, 0 restarts", "logs -n shop web -c c --previous"}},
		{"is being created", found(judgeCluster, waits("ContainerCreating", "")), []string{"WARNING", "still being created"}},
		{"more pods than were read", found(judgeCluster, cluster{more: true}), []string{"UNKNOWN", "more than 2000 pods"}},
		{"many", func() []Finding { return found(judgeCluster, many)()[mostFindings:] }, []string{"PROBLEM", "5 findings more"}},
	}
}

func TestJudgements(t *testing.T) {
	for group, list := range map[string][]judgement{"machine": machineJudgements(), "network": networkJudgements(), "storage": storageJudgements(), "running": runningJudgements(), "cluster": clusterJudgements()} {
		for _, j := range list {
			t.Run(group+"/"+j.what, func(t *testing.T) { j.check(t, group) })
		}
	}
}

func (j judgement) check(t *testing.T, name string) {
	found := j.find()
	if want := min(len(j.want), 1); len(found) != want {
		t.Fatalf("%d findings, want %d: %+v", len(found), want, found)
	}
	if len(found) == 0 {
		return
	}
	if found[0].Subject == "" {
		found[0].Subject = name // as run does it
		if name == "running" {
			found[0].Subject = "kedge"
		}
		if name == "network" {
			found[0].Subject = "firewall"
		}
	}
	line, _, _ := strings.Cut(Report{Findings: found}.text(now), "\n")
	rest := line
	for _, w := range j.want {
		_, after, ok := strings.Cut(rest, w)
		if !ok {
			t.Fatalf("no %q in the rest of %q", w, line)
		}
		rest = after
	}
	if found[0].Remedy == "" && found[0].Level != Unknown {
		t.Errorf("no remedy: %s", line)
	}
}

// TestFix repairs what has a repair, and says what it did, or why not.
func TestFix(t *testing.T) {
	set := ""
	f := sysctls(ipForward, "0")
	f.writable = func(name, value string) error { set = name + "=" + value; return nil }
	l := limits{instances: use{128, 128}, set: func(string, string) error { return os.ErrPermission }}
	r := Report{Findings: append(judgeForwarding(healthy(), f), judgeLimits(healthy(), l)...)}
	r.Findings = append(r.Findings, Finding{Level: Warning, Subject: "x", What: "y"})
	r.repair()
	r.sort()
	if set != ipForward+"=1" {
		t.Errorf("set %q", set)
	}
	got := r.text(now)
	for _, want := range []string{
		"PROBLEM  inotify: 128 of 128 inotify instances of root are in use: programs fail with \"too many open files\"; sysctl -w fs.inotify.max_user_instances=8192; not repaired: permission denied\nWARNING  x: y\nFIXED    net.ipv4.ip_forward: ",
		"; set net.ipv4.ip_forward to 1\n1 problem, 1 warning, 1 fixed by 0 checks; ",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if r.Has(Unknown) || !r.Has(Problem) {
		t.Errorf("levels of %+v", r)
	}
}
