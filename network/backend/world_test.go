package backend_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
	"kedge/network"
	"kedge/network/backend"
	"kedge/network/cniclient"
)

// nodeVar holds the configuration of a node's process.
const nodeVar = "KEDGE_TEST_NODE"

// nodeConfig is the configuration of a node's process. The process then reads lists of
// nodes from its standard input, one for each line, and prints an update for each of its
// actions.
type nodeConfig struct {
	Name, Dir, Mode, Interface string
	Addrs                      []netip.Addr
	Cluster                    []netip.Prefix
	Ranges                     []netip.Prefix
	KeyLife                    time.Duration
	MTU                        int // of pods; 0 for the most that fits
}

// update is a line that a node's process prints.
type update struct {
	Ready      bool
	Key, Value string // annotation that it wants
}

// nodeMain is a node: its network and its backend, without a container runtime, and with an
// API whose content comes from standard input.
func nodeMain() error {
	var cfg nodeConfig
	if err := json.Unmarshal([]byte(os.Getenv(nodeVar)), &cfg); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("node", cfg.Name)
	var out sync.Mutex
	say := func(u update) {
		out.Lock()
		defer out.Unlock()
		json.NewEncoder(os.Stdout).Encode(u)
	}
	b := backend.DefaultConfig()
	b.NodeName, b.NodeIPs, b.Mode, b.Interface = cfg.Name, cfg.Addrs, backend.Mode(cfg.Mode), cfg.Interface
	if cfg.KeyLife != 0 {
		b.KeyLife = cfg.KeyLife
	}
	b.Ranges = cfg.Cluster
	b.KeyFile = filepath.Join(cfg.Dir, "run", "wireguard.key")
	n := network.DefaultConfig()
	n.NodeName, n.DataDir, n.RunDir = cfg.Name, filepath.Join(cfg.Dir, "data"), filepath.Join(cfg.Dir, "run")
	n.PodCIDRs, n.ClusterCIDRs, n.NodeIPs, n.Overhead = cfg.Ranges, cfg.Cluster, cfg.Addrs, b.Overhead()
	n.MTU = cfg.MTU
	pods := network.New(n, nil, log)

	api := fake.NewClientset()
	watches := informers.NewSharedInformerFactory(api, 0)
	annotate := func(_ context.Context, key, value string) error { say(update{Key: key, Value: value}); return nil }
	component, err := backend.New(b, watches, annotate, pods.SetNodes, log)
	if err != nil {
		return err
	}
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<20)
	if !lines.Scan() {
		return errors.New("no list of nodes")
	}
	if err := follow(ctx, api, lines.Bytes()); err != nil {
		return err
	}
	watches.Start(ctx.Done())
	watches.WaitForCacheSync(ctx.Done())
	go func() {
		for lines.Scan() {
			if err := follow(ctx, api, lines.Bytes()); err != nil {
				log.Error("follow", "err", err)
			}
		}
		stop() // the test has ended
	}()
	var parts sync.WaitGroup
	var begun sync.WaitGroup
	begun.Add(2)
	errs := make(chan error, 2)
	for _, run := range []func(context.Context, func()) error{pods.Run, component.Run} {
		parts.Go(func() { errs <- run(ctx, sync.OnceFunc(begun.Done)); stop() })
	}
	go func() { begun.Wait(); say(update{Ready: true}) }()
	parts.Wait()
	return errors.Join(<-errs, <-errs)
}

// follow makes the API's nodes those of a list.
func follow(ctx context.Context, api *fake.Clientset, list []byte) error {
	var want []corev1.Node
	if err := json.Unmarshal(list, &want); err != nil {
		return err
	}
	nodes := api.CoreV1().Nodes()
	have, err := nodes.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	gone := map[string]bool{}
	for _, n := range have.Items {
		gone[n.Name] = true
	}
	for _, n := range want {
		delete(gone, n.Name)
		_, err := nodes.Update(ctx, &n, metav1.UpdateOptions{})
		if apierrors.IsNotFound(err) {
			_, err = nodes.Create(ctx, &n, metav1.CreateOptions{})
		}
		if err != nil {
			return err
		}
	}
	for name := range gone {
		if err := nodes.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// cluster is a number of machines on one switch, with their nodes in the API.
type cluster struct {
	t    testing.TB
	mode backend.Mode
	mtu  int // of pods of machines that are added; 0 for the most that fits
	lan  *host.LAN

	mu       sync.Mutex // guards what follows
	machines []*machine
	objects  map[string]*corev1.Node
}

// machine is a node.
type machine struct {
	*host.Host
	c     *cluster
	cfg   nodeConfig
	cmd   *exec.Cmd
	stdin io.WriteCloser
	ended chan struct{}
	pods  int
	log   safeBuffer // of all its processes
}

// safeBuffer may be read while a process writes to it.
type safeBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// families of addresses that a test is about.
type families struct {
	nodes, pods string // "4", "6" or "46"
}

func newCluster(t testing.TB, mode backend.Mode) *cluster {
	host.RequireIsolation(t)
	if t, ok := t.(*testing.T); ok {
		t.Parallel() // most of what these tests do is wait
	}
	lan, err := host.NewLAN()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lan.Close() })
	return &cluster{t: t, mode: mode, lan: lan, objects: map[string]*corev1.Node{}}
}

func has(families string, ipv6 bool) bool {
	return bytes.ContainsAny([]byte(families), map[bool]string{false: "4", true: "6"}[ipv6])
}

// machine adds the i-th node and starts it.
func (c *cluster) machine(i int, f families) *machine {
	c.t.Helper()
	var addrs []netip.Prefix
	m := &machine{c: c}
	m.cfg = nodeConfig{Name: fmt.Sprintf("node%d", i), Mode: string(c.mode), MTU: c.mtu}
	if has(f.nodes, false) {
		addrs = append(addrs, netip.MustParsePrefix(fmt.Sprintf("192.0.2.%d/24", i)))
	}
	if has(f.nodes, true) {
		addrs = append(addrs, netip.MustParsePrefix(fmt.Sprintf("2001:db8::%d/64", i)))
	}
	if has(f.pods, false) {
		m.cfg.Ranges = append(m.cfg.Ranges, netip.MustParsePrefix(fmt.Sprintf("10.42.%d.0/24", i)))
		m.cfg.Cluster = append(m.cfg.Cluster, netip.MustParsePrefix("10.42.0.0/16"))
	}
	if has(f.pods, true) {
		m.cfg.Ranges = append(m.cfg.Ranges, netip.MustParsePrefix(fmt.Sprintf("fd42:0:0:%d::/64", i)))
		m.cfg.Cluster = append(m.cfg.Cluster, netip.MustParsePrefix("fd42::/48"))
	}
	for _, a := range addrs {
		m.cfg.Addrs = append(m.cfg.Addrs, a.Addr())
	}
	var err error
	if m.Host, err = c.lan.Host(m.cfg.Name, addrs...); err != nil {
		c.t.Fatal(err)
	}
	// While the kernel runs duplicate address detection for its link-local address, it
	// cannot resolve IPv6 neighbours: a real machine has been up for longer.
	c.within(5*time.Second, m.cfg.Name+" has its addresses", func() error {
		uplink, err := m.Netlink().LinkByName(host.Uplink)
		if err != nil {
			return err
		}
		addrs, err := m.Netlink().AddrList(uplink, syscall.AF_INET6)
		for _, a := range addrs {
			if a.Flags&unix.IFA_F_TENTATIVE != 0 && has(f.nodes, true) {
				return fmt.Errorf("%s is tentative", a)
			}
		}
		return err
	})
	// The strictest that distributions set.
	c.must(m.Do(func() error {
		for _, name := range []string{"all", "default", host.Uplink} {
			if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/rp_filter", []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	}))
	if m.cfg.Dir, err = os.MkdirTemp("", "kedge-be"); err != nil { // short: holds a socket
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { os.RemoveAll(m.cfg.Dir) })
	c.must(os.MkdirAll(filepath.Join(m.cfg.Dir, "run"), 0o700))
	c.t.Cleanup(m.leavesNothing)
	c.mu.Lock()
	c.machines = append(c.machines, m)
	c.mu.Unlock()
	c.set(m)
	m.start()
	c.t.Cleanup(func() { m.end(syscall.SIGTERM) })
	return m
}

// set publishes a machine as the API would, after its configuration has changed.
func (c *cluster) set(m *machine) {
	o := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: m.cfg.Name, Annotations: map[string]string{}}}
	for _, r := range m.cfg.Ranges {
		o.Spec.PodCIDRs = append(o.Spec.PodCIDRs, r.String())
	}
	for _, a := range m.cfg.Addrs {
		o.Status.Addresses = append(o.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.objects[o.Name]; old != nil {
		o.Annotations = old.Annotations
	}
	c.objects[o.Name] = o
	c.push()
}

// remove deletes a machine's node object.
func (c *cluster) remove(m *machine) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.objects, m.cfg.Name)
	c.push()
}

// push tells all processes. Caller holds mu.
func (c *cluster) push() {
	var list []*corev1.Node
	for _, o := range c.objects {
		list = append(list, o)
	}
	data, err := json.Marshal(list)
	c.must(err)
	for _, m := range c.machines {
		if m.stdin != nil {
			m.stdin.Write(append(data, '\n'))
		}
	}
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

// start runs the node's process, and returns when it is ready.
func (m *machine) start() {
	m.c.t.Helper()
	config, err := json.Marshal(m.cfg)
	m.c.must(err)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), nodeVar+"="+string(config))
	cmd.Stderr = io.MultiWriter(m.c.t.Output(), &m.log)
	stdin, err := cmd.StdinPipe()
	m.c.must(err)
	stdout, err := cmd.StdoutPipe()
	m.c.must(err)
	m.c.must(m.Host.Start(cmd))
	ready := make(chan struct{})
	m.cmd, m.ended = cmd, make(chan struct{})
	go func() {
		defer close(m.ended)
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			var u update
			if json.Unmarshal(lines.Bytes(), &u) != nil {
				continue
			}
			if u.Ready {
				close(ready)
				continue
			}
			m.c.mu.Lock()
			if o := m.c.objects[m.cfg.Name]; o != nil && o.Annotations[u.Key] != u.Value {
				o.Annotations[u.Key] = u.Value
				m.c.push()
			}
			m.c.mu.Unlock()
		}
		cmd.Wait()
	}()
	m.c.mu.Lock()
	m.stdin = stdin
	m.c.push()
	m.c.mu.Unlock()
	select {
	case <-ready:
	case <-m.ended:
		m.c.t.Fatalf("node %s ended early", m.cfg.Name)
	case <-time.After(30 * time.Second):
		m.c.t.Fatalf("node %s is not ready", m.cfg.Name)
	}
}

// end ends the node's process; its objects in the kernel stay.
func (m *machine) end(sig syscall.Signal) {
	m.c.mu.Lock()
	running := m.stdin != nil
	m.stdin = nil
	m.c.mu.Unlock()
	if !running {
		return
	}
	m.cmd.Process.Signal(sig)
	select {
	case <-m.ended:
	case <-time.After(30 * time.Second):
		m.c.t.Errorf("node %s does not end", m.cfg.Name)
		m.cmd.Process.Signal(syscall.SIGQUIT) // it says where its goroutines are
		select {
		case <-m.ended:
		case <-time.After(5 * time.Second):
			m.cmd.Process.Kill()
			<-m.ended
		}
	}
}

// leavesNothing checks that cleaning up removes every kernel object.
func (m *machine) leavesNothing() {
	err := m.Do(func() error {
		n := network.DefaultConfig()
		n.NodeName, n.DataDir, n.RunDir = m.cfg.Name, filepath.Join(m.cfg.Dir, "data"), filepath.Join(m.cfg.Dir, "run")
		return errors.Join(backend.Cleanup(m.cfg.Name), network.Cleanup(n))
	})
	if err != nil {
		m.c.t.Error(err)
	}
	links, err := m.Netlink().LinkList()
	m.c.must(err)
	for _, l := range links {
		if n := l.Attrs().Name; n != "lo" && n != host.Uplink {
			m.c.t.Errorf("%s: interface left over: %s", m.cfg.Name, n)
		}
	}
	if left := ours(m); len(left) > 0 {
		m.c.t.Errorf("%s: left over: %v", m.cfg.Name, left)
	}
}

// ours lists the routes and rules of the backend on a machine.
func ours(m *machine) (out []string) {
	for _, family := range []int{syscall.AF_INET, syscall.AF_INET6} {
		routes, err := m.Netlink().RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE) // of all tables
		m.c.must(err)
		for _, r := range routes {
			if r.Protocol == 213 {
				out = append(out, r.String())
			}
		}
		rules, err := m.Netlink().RuleList(family)
		m.c.must(err)
		for _, r := range rules {
			if r.Protocol == 213 {
				out = append(out, r.String())
			}
		}
	}
	return out
}

// pod is a network namespace that a machine has attached.
type pod struct {
	m     *machine
	ns    *namespaces.Network
	addrs []netip.Addr
}

func (m *machine) pod() *pod {
	t := m.c.t
	t.Helper()
	m.pods++
	p := &pod{m: m}
	var err error
	p.ns, err = namespaces.NewNetwork()
	m.c.must(err)
	t.Cleanup(func() { p.ns.Close() })
	conf, err := os.ReadFile(filepath.Join(m.cfg.Dir, "data", "cni", "net.d", "10-kedge.conflist"))
	m.c.must(err)
	var list struct {
		CNIVersion string           `json:"cniVersion"`
		Name       string           `json:"name"`
		Plugins    []map[string]any `json:"plugins"`
	}
	m.c.must(json.Unmarshal(conf, &list))
	c := list.Plugins[0]
	c["cniVersion"], c["name"] = list.CNIVersion, list.Name
	config, err := json.Marshal(c)
	m.c.must(err)
	id := fmt.Sprintf("%s-pod%d", m.cfg.Name, m.pods)
	resp, err := cniclient.Call(c["socket"].(string), cniclient.Request{
		Command: "ADD", ContainerID: id, IfName: "eth0", Netns: p.ns.Path(),
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + id, Config: config,
	})
	m.c.must(err)
	if resp.Failed {
		t.Fatal(string(resp.Output))
	}
	var result struct {
		IPs []struct{ Address netip.Prefix }
	}
	m.c.must(json.Unmarshal(resp.Output, &result))
	for _, ip := range result.IPs {
		p.addrs = append(p.addrs, ip.Address.Addr())
	}
	return p
}

func (p *pod) addr(ipv6 bool) netip.Addr { return pick(p.addrs, ipv6) }

func pick(addrs []netip.Addr, ipv6 bool) netip.Addr {
	for _, a := range addrs {
		if a.Is6() == ipv6 {
			return a
		}
	}
	return netip.Addr{}
}

// place runs a function somewhere: in a pod or on a host.
type place func(func() error) error

// closeWith closes a connection at the end of the test, whose networks may end before the other side's goodbye has come. The
// function that it returns closes it now.
func closeWith(t testing.TB, conn net.Conn) func() {
	stop := context.AfterFunc(t.Context(), func() { conn.Close() })
	return func() {
		stop()
		conn.Close()
	}
}

// serve answers datagrams and connections at a place with the caller's address.
func (c *cluster) serve(at place, port int) {
	var l net.Listener
	var u net.PacketConn
	c.must(at(func() (err error) {
		if l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		u, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	}))
	c.t.Cleanup(func() { l.Close(); u.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer closeWith(c.t, conn)()
				// The received length, so that the caller can check that everything
				// arrived.
				n, _ := io.Copy(io.Discard, conn)
				fmt.Fprintf(conn, "%s %d", conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(), n)
			}()
		}
	}()
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			u.WriteTo(fmt.Appendf(nil, "%s %d", from.(*net.UDPAddr).AddrPort().Addr().Unmap(), n), from)
		}
	}()
}

// ask sends size bytes from a place and returns the address that the server saw.
func (c *cluster) ask(from place, network string, to netip.Addr, port, size int) (string, error) {
	var conn net.Conn
	err := from(func() (err error) {
		conn, err = net.DialTimeout(network, netip.AddrPortFrom(to, uint16(port)).String(), 250*time.Millisecond)
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	if _, err := conn.Write(make([]byte, size)); err != nil {
		return "", err
	}
	buf := make([]byte, 128)
	if t, ok := conn.(*net.TCPConn); ok {
		t.CloseWrite()
	}
	n, err := conn.Read(buf)
	if err != nil {
		return "", err
	}
	var seen string
	var got int
	if _, err := fmt.Sscanf(string(buf[:n]), "%s %d", &seen, &got); err != nil || got != size {
		return "", fmt.Errorf("answer %q to %d bytes", buf[:n], size)
	}
	return seen, nil
}

// within tries until it works, and fails the test when it has not in time.
func (c *cluster) within(d time.Duration, what string, try func() error) {
	c.t.Helper()
	begin := time.Now()
	for {
		err := try()
		if err == nil {
			c.t.Logf("%s: after %v", what, time.Since(begin).Round(time.Millisecond))
			return
		}
		if time.Since(begin) > d {
			c.t.Fatalf("%s: not within %v: %v", what, d, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
