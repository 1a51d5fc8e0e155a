package doctor

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
	"kedge/internal/pki"
	"kedge/internal/test/host"
	"kedge/preflight"
)

// addLink adds an interface without a network behind it.
func addLink(t *testing.T, name string, mtu int, address string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	l := &netlink.Veth{LinkAttrs: attrs, PeerName: "x" + name[1:]}
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(l) })
	if address != "" {
		a, err := netlink.ParseAddr(address)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
}

// TestForwarding reads kernel parameters of a machine with pods, and repairs one.
func TestForwarding(t *testing.T) {
	host.RequireIsolation(t)
	addLink(t, "kdg1aaa", 1450, "")
	addLink(t, "kedge-12345678", 1450, "")
	addLink(t, "other", 1500, "")
	for name, value := range map[string]string{ipForward: "0", "net/ipv4/conf/kdg1aaa/rp_filter": "1", "net/ipv4/conf/all/rp_filter": "0"} {
		if err := setSysctl(name, value); err != nil {
			t.Fatal(err)
		}
	}
	s := healthy()
	f, err := readForwarding(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(f.links)
	if f.pods != 1 || !slices.Equal(f.links, []string{"kdg1aaa", "kedge-12345678"}) || f.sysctls[ipForward] != "0" {
		t.Errorf("%+v", f)
	}
	r := Report{Findings: judgeForwarding(s, f)}
	if len(r.Findings) != 2 || !strings.Contains(r.Findings[1].What, "strict (1) on kdg1aaa:") {
		t.Fatalf("%+v", r.Findings)
	}
	r.repair()
	if now, _ := os.ReadFile("/proc/sys/" + ipForward); string(now) != "1\n" || r.Findings[0].Level != Fixed {
		t.Errorf("ip_forward is %q, %+v", now, r.Findings[0])
	}
}

// TestMTU reads the MTU of the interface with the node's address.
func TestMTU(t *testing.T) {
	host.RequireIsolation(t)
	addLink(t, "up0", 1400, "192.0.2.7/24")
	addLink(t, "kdg1aaa", 1450, "")
	addLink(t, "kedge-12345678", 1450, "")
	s := healthy()
	s.NodeIPs = []netip.Addr{netip.MustParseAddr("192.0.2.7")}
	m, err := readMTU(t.Context(), s)
	if err != nil || m.uplink != (link{"up0", 1400}) || len(m.tunnels) != 1 || len(m.pods) != 1 {
		t.Errorf("%+v, %v", m, err)
	}
	s.NodeIPs = nil
	if _, err := readMTU(t.Context(), s); err == nil {
		t.Error("a machine without the address has an MTU")
	}
}

// TestPorts finds the process that listens.
func TestPorts(t *testing.T) {
	host.RequireIsolation(t)
	s := healthy()
	var udp net.PacketConn
	for _, network := range []string{"tcp4", "tcp6"} {
		l, err := net.Listen(network, ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		s.Ports = append(s.Ports, Port{Port: preflight.Port{Number: l.Addr().(*net.TCPAddr).Port, Protocol: "tcp", Purpose: network}})
	}
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	number := udp.LocalAddr().(*net.UDPAddr).Port
	s.Ports = append(s.Ports, Port{Port: preflight.Port{Number: number, Protocol: "udp", Purpose: "udp"}}, Port{Port: preflight.Port{Number: 1, Protocol: "tcp", Purpose: "nobody's"}})
	held, err := readPorts(t.Context(), s)
	if err != nil || len(held) != 3 {
		t.Fatalf("%+v, %v", held, err)
	}
	for _, h := range held {
		if h.pid != os.Getpid() || h.name != processName(os.Getpid()) || h.ours {
			t.Errorf("%+v", h)
		}
	}
	vxlan := &netlink.Vxlan{LinkAttrs: netlink.LinkAttrs{Name: "vx0"}, VxlanId: 7, Port: 18472}
	if err := netlink.LinkAdd(vxlan); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(vxlan)
	if err := netlink.LinkSetUp(vxlan); err != nil { // the kernel listens then
		t.Fatal(err)
	}
	s.Ports = append(s.Ports, Port{Port: preflight.Port{Number: 18472, Protocol: "udp", Purpose: "VXLAN"}})
	if again, err := readPorts(t.Context(), s); err != nil || len(again) != len(held) {
		t.Errorf("the kernel's port belongs to a process: %+v, %v", again, err)
	}
	s.report.PID = os.Getpid()
	held, _ = readPorts(t.Context(), s)
	for _, h := range held {
		if !h.ours {
			t.Errorf("%+v", h)
		}
	}
}

// TestFirewall: chains of another program, and policies of the older packet filter.
func TestFirewall(t *testing.T) {
	host.RequireIsolation(t)
	addLink(t, "up0", 1500, "192.0.2.7/24")
	s := healthy()
	s.NodeIPs = []netip.Addr{netip.MustParseAddr("192.0.2.7")}
	s.Preflight.PodRanges = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/24")}
	s.Ports = []Port{{Port: preflight.Port{Number: 6443, Protocol: "tcp", Purpose: "API server"}}}
	if f, err := readFirewall(t.Context(), s); err != nil || len(f.pods)+len(f.ports)+len(f.legacy) > 0 {
		t.Errorf("without a firewall: %+v, %v", f, err)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	table := conn.AddTable(&nftables.Table{Name: "host", Family: nftables.TableFamilyINet})
	policy := nftables.ChainPolicyDrop
	for name, hook := range map[string]*nftables.ChainHook{"input": nftables.ChainHookInput, "forward": nftables.ChainHookForward} {
		conn.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &policy})
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		conn.DelTable(table)
		if err := conn.Flush(); err != nil {
			t.Error(err)
		}
	}()
	f, err := readFirewall(t.Context(), s)
	if err != nil || len(f.pods) != 2 || len(f.ports) != 1 || len(f.ports["port 6443/tcp (API server)"]) != 1 { // forward; the DNS is reached by input
		t.Errorf("%+v, %v", f, err)
	}
	s.Backend = Port{Port: preflight.Port{Number: 8472, Protocol: "udp", Purpose: "network of pods"}}
	addLink(t, "kedge-12345678", 1450, "") // a way to other nodes
	if f, err := readFirewall(t.Context(), s); err != nil || len(f.ports) != 2 || len(f.ports["port 8472/udp (network of pods)"]) != 1 {
		t.Errorf("%+v, %v", f, err)
	}
}

// TestLegacy reads the older packet filter of the kernel, if the kernel has it.
func TestLegacy(t *testing.T) {
	host.RequireIsolation(t)
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	info := make([]byte, infoSize)
	copy(info, "filter")
	if err := getsockopt(fd, getInfo, info); err != nil { // it creates the table
		t.Skipf("this kernel lacks iptables-legacy: %v", err)
	}
	want := func(what string, want ...legacyChain) {
		t.Helper()
		got, err := readLegacy()
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %+v, %v, want %+v", what, got, err, want)
		}
	}
	want("new", legacyChain{"INPUT", false, 0}, legacyChain{"FORWARD", false, 0})

	length := binary.NativeEndian.Uint32(info[infoSize-4:])
	entries := make([]byte, entriesHead+int(length))
	copy(entries, "filter")
	binary.NativeEndian.PutUint32(entries[nameSize:], length)
	if err := getsockopt(fd, getEntries, entries); err != nil {
		t.Fatal(err)
	}
	policy := binary.NativeEndian.Uint32(info[56+4*2:])
	blob := entries[entriesHead:]
	drops := int32(dropVerdict)
	binary.NativeEndian.PutUint32(blob[policy+entrySize+targetHead:], uint32(drops))
	const replaceHead, setReplace = 96, 64 // struct ipt_replace, IPT_SO_SET_REPLACE
	replace := make([]byte, replaceHead, replaceHead+len(blob))
	copy(replace, "filter")
	count := binary.NativeEndian.Uint32(info[76:])
	copy(replace[32:], info[32:36])                     // valid hooks
	binary.NativeEndian.PutUint32(replace[36:], count)  // entries
	binary.NativeEndian.PutUint32(replace[40:], length) // their size
	copy(replace[44:], info[36:76])                     // entries and underflows of the hooks
	binary.NativeEndian.PutUint32(replace[84:], count)  // old counters
	counters := make([]byte, 16*count)                  // that the kernel gives back
	*(*unsafe.Pointer)(unsafe.Pointer(&replace[88])) = unsafe.Pointer(&counters[0])
	replace = append(replace, blob...)
	if err := unix.SetsockoptString(fd, unix.SOL_IP, setReplace, string(replace)); err != nil {
		t.Fatal(err)
	}
	want("policy", legacyChain{"INPUT", false, 0}, legacyChain{"FORWARD", true, 0})
}

// TestLegacyAnswers: answers of the kernel with rules, and such that cannot be right.
func TestLegacyAnswers(t *testing.T) {
	const entry = entrySize + 40 // with a standard target
	rule := func(verdict int32) []byte {
		e := make([]byte, entry)
		binary.NativeEndian.PutUint16(e[nextOffset:], entry)
		binary.NativeEndian.PutUint32(e[entrySize+targetHead:], uint32(verdict))
		return e
	}
	info := make([]byte, infoSize)
	place := func(hook int, begin, policy uint32) {
		binary.NativeEndian.PutUint32(info[36+4*hook:], begin)
		binary.NativeEndian.PutUint32(info[56+4*hook:], policy)
	}
	place(1, 0, 0)
	place(2, entry, 3*entry)
	entries := slices.Concat(rule(-2), rule(-2), rule(-2), rule(dropVerdict))
	got, err := parseLegacy(info, entries)
	if err != nil || !slices.Equal(got, []legacyChain{{"INPUT", false, 0}, {"FORWARD", true, 2}}) {
		t.Errorf("%+v, %v", got, err)
	}
	for what, broken := range map[string][]byte{"short": entries[:3*entry], "empty": nil, "zeros": make([]byte, len(entries))} {
		if _, err := parseLegacy(info, broken); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
	if _, err := parseLegacy(nil, entries); err == nil {
		t.Error("no error without the first answer")
	}
}

func TestSockets(t *testing.T) {
	const head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	got := parseSockets(head+
		"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0000000000000000 100 0 0 10 0\n"+
		"   1: 0100007F:1F91 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 4243 1 0000000000000000 100 0 0 10 0\n"+
		"   2: 00000000000000000000000001000000:0035 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4244 1 0000000000000000 100 0 0 10 0\n"+
		"   3: nonsense\n", true)
	want := []socket{{netip.MustParseAddrPort("127.0.0.1:8080"), "4242"}, {netip.MustParseAddrPort("[::1]:53"), "4244"}}
	if !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

// TestSync measures the disk, and leaves nothing behind.
func TestSync(t *testing.T) {
	s := healthy()
	s.DataDir = t.TempDir()
	m, err := readSync(t.Context(), s)
	if err != nil || len(m.took) < 1 || len(m.took) > syncWrites || m.took[0] <= 0 || !slices.IsSorted(m.took) {
		t.Errorf("%+v, %v", m, err)
	}
	if left, _ := os.ReadDir(s.DataDir); len(left) > 0 {
		t.Errorf("left %v", left)
	}
	s.state = Absent
	if _, err := readSync(t.Context(), s); err == nil {
		t.Error("a machine without a node was written to")
	}
}

// TestCertificates reads certificates of the data directory and of the kubeconfig, and no file of pods.
func TestCertificates(t *testing.T) {
	s := healthy()
	s.DataDir = t.TempDir()
	dir := filepath.Join(s.DataDir, "server/tls")
	long := time.Now().AddDate(-20, 0, 0)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a, err := pki.EnsureAuthority(dir, "ca", long)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"kubelet/pods/1/ca.crt", "containerd/x/y.crt", "agent/damaged.crt", "agent/other.pem"} {
		path = filepath.Join(s.DataDir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("nonsense"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.Kubeconfig = filepath.Join(s.DataDir, "kubeconfig")
	if err := os.WriteFile(s.Kubeconfig, []byte("users:\n- user:\n    client-certificate-data: "+base64.StdEncoding.EncodeToString(a.PEM())+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := readCertificates(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if len(c.list) != 2 || !c.list[0].authority || c.list[0].path != filepath.Join(dir, "ca.crt") || c.list[1].path != s.Kubeconfig || c.list[0].notAfter.Before(long) {
		t.Errorf("%+v", c.list)
	}
	if want := []string{filepath.Join(s.DataDir, "agent/damaged.crt")}; !slices.Equal(c.damaged, want) {
		t.Errorf("damaged %q", c.damaged)
	}
}

// TestFactsOfThisMachine: readers of what every machine has return without an error.
func TestFactsOfThisMachine(t *testing.T) {
	host.RequireIsolation(t)
	s := healthy()
	s.DataDir, s.RunDir = t.TempDir(), t.TempDir()
	s.report.PID = os.Getpid()
	s.ResolvConf = filepath.Join(s.DataDir, "resolv.conf")
	if err := os.WriteFile(s.ResolvConf, []byte("# x\nnameserver 192.0.2.1\nnameserver fe80::1%eth0\nnameserver nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := readClock(t.Context(), s); err != nil || time.Since(c.now) > time.Minute {
		t.Errorf("clock %+v, %v", c, err)
	}
	if m, err := readMemory(t.Context(), s); err != nil || m.total == 0 || m.available == 0 || m.available > m.total {
		t.Errorf("memory %+v, %v", m, err)
	}
	w, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(w)
	if _, err := unix.InotifyAddWatch(w, s.DataDir, unix.IN_CREATE); err != nil {
		t.Fatal(err)
	}
	if l, err := readLimits(t.Context(), s); err != nil || l.files.used < 4 || l.files.limit < l.files.used || l.allFiles.used == 0 || l.instances.used < 1 || l.watches.used < 1 || l.instances.limit == 0 {
		t.Errorf("limits %+v, %v", l, err)
	}
	if d, err := readDisks(t.Context(), s); err != nil || len(d) != 2 || d[0].size == 0 {
		t.Errorf("disks %+v, %v", d, err)
	}
	if n, err := readNameServers(t.Context(), s); err != nil || len(n.list) != 2 {
		t.Errorf("name servers %+v, %v", n, err)
	}
	if share("some avg10=1.00 avg60=2.50 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.75 avg300=0.00 total=1\n", "full") != 0.75 {
		t.Error("pressure")
	}
}

// TestCluster reads nodes and pods with the administrator's kubeconfig.
func TestCluster(t *testing.T) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/api/v1/nodes":
			fmt.Fprint(w, `{"kind":"NodeList","apiVersion":"v1","items":[{"metadata":{"name":"a"}}]}`)
		case "/api/v1/pods":
			fmt.Fprint(w, `{"kind":"PodList","apiVersion":"v1","metadata":{"continue":"x"},"items":[{"metadata":{"name":"p","namespace":"n"}}]}`)
		default:
			http.NotFound(w, r)
		}
	}))
	defer api.Close()
	s := healthy()
	s.Kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	config := `{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {}}], clusters: [{name: c, cluster: {server: "` + api.URL + `"}}]}`
	if err := os.WriteFile(s.Kubeconfig, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := readCluster(t.Context(), s)
	if err != nil || len(c.nodes) != 1 || len(c.pods) != 1 || !c.more {
		t.Errorf("%+v, %v", c, err)
	}
	http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	api.Close()
	if _, err := readCluster(t.Context(), s); err == nil {
		t.Error("an API that is away has pods")
	}
	s.Kubeconfig = ""
	for _, state := range []State{Running, Stopped} {
		s.state = state
		if _, err := readCluster(t.Context(), s); err == nil {
			t.Errorf("%s without a kubeconfig: no error", state)
		}
	}
}

// TestExamine tells machines apart.
func TestExamine(t *testing.T) {
	host.RequireIsolation(t)
	dir := t.TempDir()
	c := Config{DataDir: dir, RunDir: dir, NodeName: "here", Preflight: preflight.DefaultConfig()}
	if s := examine(t.Context(), c); s.state != Absent || s.Preflight.Exists {
		t.Errorf("%+v", s)
	}
	if err := os.WriteFile(filepath.Join(dir, "kedge.json"), []byte(`{"format":1,"nodeName":"owner","lastSeen":"2026-01-01T00:00:00Z"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "disk-probe"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s := examine(t.Context(), c)
	if s.state != Stopped || s.NodeName != "owner" || !s.Preflight.Exists || time.Since(s.alive) > time.Minute || s.datadir.LastSeen.IsZero() {
		t.Errorf("%+v", s)
	}
	if err := os.WriteFile(filepath.Join(dir, "kedge.sock"), nil, 0o600); err != nil { // as a crash leaves it
		t.Fatal(err)
	}
	if s := examine(t.Context(), c); s.state != Stopped || s.silent != nil {
		t.Errorf("%+v", s)
	}
	run(t, dir)
	if s := examine(t.Context(), c); s.state != Running || s.report.PID != 4711 || s.Preflight.Running != 4711 {
		t.Errorf("%+v", s)
	}
	r := Run(t.Context(), c, false)
	if r.Node != "there" || r.PID != 4711 || r.Checks < 8 || slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Subject == "component dns" && f.What == "loops" }) == false {
		t.Errorf("%s", r)
	}
}

// run answers for a kedge with the run directory until the test is over.
func run(t *testing.T, dir string) {
	server := control.NewServer(dir, func(context.Context) control.Report {
		return control.Report{Node: "there", PID: 4711, Components: []lifecycle.Status{{Name: "dns", State: lifecycle.Ready, Error: "loops"}}}
	})
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- server.Run(ctx, func() { close(ready) }) }()
	<-ready
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
