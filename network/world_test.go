package network

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
	testhost "kedge/internal/test/host"
	"kedge/network/cniclient"
)

// world is a node (the test program's own namespace) joined by a cable to a
// host that stands for the outside, and the pods that the node's network serves.
type world struct {
	t       testing.TB
	cfg     Config
	network *Network
	outside *namespaces.Network
	stop    func() // ends Run and waits for it
	pods    int
}

var (
	nodeV4    = netip.MustParsePrefix("192.0.2.1/24")
	outsideV4 = netip.MustParsePrefix("192.0.2.9/24")
	nodeV6    = netip.MustParsePrefix("2001:db8:1::1/64")
	outsideV6 = netip.MustParsePrefix("2001:db8:1::9/64")
	podsV4    = netip.MustParsePrefix("10.42.0.0/24")
	podsV6    = netip.MustParsePrefix("fd42::/64")
)

func dualStack() []netip.Prefix { return []netip.Prefix{podsV4, podsV6} }

// newWorld starts a network with the given ranges. Everything is removed after
// the test, and the test fails if the network's own cleaning leaves something.
func newWorld(t testing.TB, ranges ...netip.Prefix) *world {
	t.Helper()
	testhost.RequireIsolation(t)
	dir, err := os.MkdirTemp("", "kedge-net") // short: holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := DefaultConfig()
	cfg.NodeName = "node1"
	cfg.DataDir, cfg.RunDir = filepath.Join(dir, "data"), filepath.Join(dir, "run")
	cfg.PodCIDRs = ranges
	cfg.Plugin = "" // the test program: see TestMain
	cfg.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/56")}
	if err := os.MkdirAll(cfg.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, cfg: cfg}
	t.Cleanup(w.noLeftovers)
	t.Cleanup(func() {
		if err := Cleanup(cfg); err != nil {
			t.Error(err)
		}
	})
	w.joinOutside()
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

// joinOutside lays the cable between the node and the outside.
func (w *world) joinOutside() {
	ns := w.namespace()
	w.outside = ns
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "uplink"
	cable := netlink.NewVeth(attrs)
	cable.PeerName, cable.PeerNamespace = "uplink", netlink.NsFd(ns.FD())
	w.must(netlink.LinkAdd(cable))
	w.t.Cleanup(func() { netlink.LinkDel(cable) })
	configure := func(addrs ...netip.Prefix) error {
		link, err := netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		for _, a := range addrs {
			flags := 0
			if a.Addr().Is6() {
				flags = unix.IFA_F_NODAD
			}
			ip := &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ip, Flags: flags}); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	}
	// Both ends up before either has an address: packets over a cable with one end down are
	// lost, and IPv6 retries only after seconds.
	w.must(configure())
	w.must(ns.Do(func() error { return configure() }))
	w.must(configure(nodeV4, nodeV6))
	w.must(ns.Do(func() error { return configure(outsideV4, outsideV6) }))
}

// routes adds routes to everything through gateways of a place.
func (w *world) routes(do func(func() error) error, gateways ...netip.Addr) {
	w.t.Helper()
	w.must(do(func() error {
		link, err := netlink.LinkByName("uplink")
		if err != nil {
			return err
		}
		for _, g := range gateways {
			all := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
			if g.Is6() {
				all = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
			}
			dst := &net.IPNet{IP: all.Addr().AsSlice(), Mask: net.CIDRMask(0, all.Addr().BitLen())}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: g.AsSlice()}); err != nil {
				return err
			}
		}
		return nil
	}))
}

// start begins a Run, as a new process would after the last one.
func (w *world) start() {
	w.t.Helper()
	w.network = New(w.cfg, nil, slog.New(slog.NewTextHandler(w.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})))
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- w.network.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		w.t.Fatalf("Run: %v", err)
	}
	stopped := false
	w.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Run: %v", err)
		}
	}
}

func (w *world) namespace() *namespaces.Network {
	w.t.Helper()
	ns, err := namespaces.NewNetwork()
	w.must(err)
	w.t.Cleanup(func() { ns.Close() })
	return ns
}

// noLeftovers checks that Cleanup has removed every kernel object.
func (w *world) noLeftovers() {
	links, err := netlink.LinkList()
	w.must(err)
	for _, l := range links {
		if l.Attrs().Name != "lo" {
			w.t.Errorf("interface left over: %s", l.Attrs().Name)
		}
	}
	filepath.WalkDir(filepath.Dir(w.cfg.DataDir), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path != filepath.Dir(w.cfg.DataDir) && path != w.cfg.DataDir && path != w.cfg.RunDir {
			w.t.Errorf("file left over: %s", path)
		}
		return nil
	})
	if tables := listTables(w.t); len(tables) > 0 {
		w.t.Errorf("nftables tables left over: %v", tables)
	}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// pod is a network namespace that the node's network has attached.
type pod struct {
	w     *world
	id    string
	ns    *namespaces.Network
	addrs []netip.Addr
}

type port struct {
	HostPort      int    `json:"hostPort"`
	ContainerPort int    `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// pod makes a namespace and attaches it through the socket, as the plugin does.
func (w *world) pod(ports ...port) *pod {
	w.t.Helper()
	w.pods++
	p := &pod{w: w, id: fmt.Sprintf("pod%d", w.pods), ns: w.namespace()}
	result, err := p.call("ADD", ports...)
	w.must(err)
	p.addrs = result
	w.t.Cleanup(func() { p.call("DEL") })
	return p
}

// call sends one request and returns the addresses of the result.
func (p *pod) call(command string, ports ...port) ([]netip.Addr, error) {
	conf, err := os.ReadFile(filepath.Join(p.w.cfg.ConfDir(), "10-kedge.conflist"))
	if err != nil {
		return nil, err
	}
	var list struct {
		CNIVersion string           `json:"cniVersion"`
		Name       string           `json:"name"`
		Plugins    []map[string]any `json:"plugins"`
	}
	if err := json.Unmarshal(conf, &list); err != nil {
		return nil, err
	}
	c := list.Plugins[0]
	c["cniVersion"], c["name"] = list.CNIVersion, list.Name
	c["runtimeConfig"] = map[string]any{"portMappings": ports}
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	resp, err := cniclient.Call(c["socket"].(string), cniclient.Request{
		Command: command, ContainerID: p.id, IfName: "eth0", Netns: p.ns.Path(),
		Args: "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=" + p.id, Config: config,
	})
	if err != nil {
		return nil, err
	}
	if resp.Failed {
		return nil, errors.New(string(resp.Output))
	}
	var result struct {
		IPs []struct {
			Address netip.Prefix `json:"address"`
		} `json:"ips"`
	}
	if len(resp.Output) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(resp.Output, &result); err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for _, ip := range result.IPs {
		addrs = append(addrs, ip.Address.Addr())
	}
	return addrs, nil
}

// here runs fn in the node's own namespace.
func here(fn func() error) error { return fn() }

// serve answers connections and datagrams at a place with the caller's address.
func (w *world) serve(do func(func() error) error, network, addr string) {
	w.t.Helper()
	if strings.HasPrefix(network, "udp") {
		var conn net.PacketConn
		w.must(do(func() (err error) { conn, err = net.ListenPacket(network, addr); return err }))
		w.t.Cleanup(func() { conn.Close() })
		go func() {
			buf := make([]byte, 64)
			for {
				_, from, err := conn.ReadFrom(buf)
				if err != nil {
					return
				}
				conn.WriteTo([]byte(host(from)), from)
			}
		}()
		return
	}
	var l net.Listener
	w.must(do(func() (err error) { l, err = net.Listen(network, addr); return err }))
	w.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, host(conn.RemoteAddr()))
			conn.Close()
		}
	}()
}

func host(a net.Addr) string {
	h, _, _ := net.SplitHostPort(a.String())
	return h
}

// ask connects from a place and returns the address that the server saw.
func (w *world) ask(do func(func() error) error, network, addr string) (string, error) {
	var conn net.Conn
	err := do(func() (err error) {
		conn, err = net.DialTimeout(network, addr, 2*time.Second)
		return err
	})
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	if strings.HasPrefix(network, "udp") {
		if _, err := conn.Write([]byte("?")); err != nil {
			return "", err
		}
		buf := make([]byte, 64)
		n, err := conn.Read(buf)
		return string(buf[:n]), err
	}
	var buf bytes.Buffer
	_, err = io.Copy(&buf, conn)
	return buf.String(), err
}

// wantSeen connects and compares the source address that the server saw.
func (w *world) wantSeen(what string, do func(func() error) error, network, addr, want string) {
	w.t.Helper()
	begin := time.Now()
	got, err := w.ask(do, network, addr)
	if d := time.Since(begin); d > 100*time.Millisecond {
		w.t.Logf("%s: %s %s took %v", what, network, addr, d)
	}
	if err != nil {
		w.t.Errorf("%s: %s %s: %v", what, network, addr, err)
	} else if got != want {
		w.t.Errorf("%s: %s %s was seen from %s, want %s", what, network, addr, got, want)
	}
}

func at(a netip.Addr, port int) string {
	return netip.AddrPortFrom(a, uint16(port)).String()
}
