package cni

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/network/cniclient"
	"kedge/network/ipam"
	"kedge/network/nft/pods"
)

func TestNames(t *testing.T) {
	long := strings.Repeat("x", 253)
	for _, node := range []string{"node1", "node2", long} {
		prefix := LinkPrefix(node)
		name := linkName(prefix, owner(long, "eth0"))
		if len(name) != unix.IFNAMSIZ-1 || !strings.HasPrefix(name, prefix) {
			t.Errorf("interface name %q of node %.8s", name, node)
		}
		if strings.ContainsAny(name, "./: ") {
			t.Errorf("interface name %q has characters that are special elsewhere", name)
		}
	}
	if got := LinkPrefix("node1"); got != "kdgnogi" {
		t.Errorf("LinkPrefix(node1) = %q: it must never change, or pods lose their interfaces at an upgrade", got)
	}
	hw := hardwareAddr("seed")
	if len(hw) != 6 || hw[0]&1 != 0 || hw[0]&2 == 0 {
		t.Errorf("%s is not a locally administered unicast address", hw)
	}
}

func TestAlias(t *testing.T) {
	for _, c := range []struct {
		alias, owner string
		ours         bool
	}{
		{alias("a", "c1/eth0"), "c1/eth0", true},
		{alias("a-b", "c1/eth0"), "", false},
		{"", "", false},
		{"somebody else's", "", false},
	} {
		own, ours := parseAlias("a", c.alias)
		if ours != c.ours || ours && own != c.owner {
			t.Errorf("parseAlias(%q) = %q, %v", c.alias, own, ours)
		}
	}
}

func TestHostPortMappings(t *testing.T) {
	for _, c := range []struct {
		conf, want string
		wrong      bool
	}{
		{`{}`, "", false},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":0,"containerPort":80}]}}`, "", false},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":8080}]}}`, "80/tcp", false},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":53,"containerPort":53,"protocol":"UDP"},{"hostPort":9,"containerPort":9,"protocol":"sctp"}]}}`, "53/udp 9/sctp", false},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":80,"hostIP":"::ffff:192.0.2.1"}]}}`, "192.0.2.1:80/tcp", false},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":80,"hostIP":"2001:db8::1"}]}}`, "[2001:db8::1]:80/tcp", false},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":80,"hostIP":"here"}]}}`, "", true},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":80,"protocol":"icmp"}]}}`, "", true},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":70000,"containerPort":80}]}}`, "", true},
		{`{"runtimeConfig":{"portMappings":[{"hostPort":80,"containerPort":-1}]}}`, "", true},
	} {
		conf, err := parseConfig(json.RawMessage(c.conf))
		if err != nil {
			t.Fatal(err)
		}
		ports, err := conf.hostPorts()
		var got []string
		for _, p := range ports {
			got = append(got, p.String())
		}
		if strings.Join(got, " ") != c.want || (err != nil) != c.wrong {
			t.Errorf("%s: %v, %v, want %q", c.conf, got, err, c.want)
		}
	}
}

func TestConflicts(t *testing.T) {
	port := func(ip string, host uint16, protocol uint8) hostPort {
		p := hostPort{Host: host, Pod: 1, Protocol: protocol}
		if ip != "" {
			p.HostIP = netip.MustParseAddr(ip)
		}
		return p
	}
	const tcp, udp = unix.IPPROTO_TCP, unix.IPPROTO_UDP
	for _, c := range []struct {
		a, b hostPort
		want bool
	}{
		{port("", 80, tcp), port("", 80, tcp), true},
		{port("", 80, tcp), port("", 80, udp), false},
		{port("", 80, tcp), port("", 81, tcp), false},
		{port("", 80, tcp), port("192.0.2.1", 80, tcp), true},
		{port("192.0.2.1", 80, tcp), port("192.0.2.2", 80, tcp), false},
		{port("0.0.0.0", 80, tcp), port("192.0.2.2", 80, tcp), true},
		{port("0.0.0.0", 80, tcp), port("::", 80, tcp), false},
		{port("::", 80, tcp), port("2001:db8::1", 80, tcp), true},
	} {
		if c.a.conflicts(c.b) != c.want || c.b.conflicts(c.a) != c.want {
			t.Errorf("%v and %v: want %v", c.a, c.b, c.want)
		}
	}
}

func TestTranslations(t *testing.T) {
	addrs := []netip.Addr{netip.MustParseAddr("10.42.0.5"), netip.MustParseAddr("fd42::5")}
	for _, c := range []struct {
		hostIP string
		want   []string // host address and pod address
	}{
		{"", []string{"invalid IP 10.42.0.5:80", "invalid IP [fd42::5]:80"}},
		{"0.0.0.0", []string{"invalid IP 10.42.0.5:80"}},
		{"::", []string{"invalid IP [fd42::5]:80"}},
		{"192.0.2.1", []string{"192.0.2.1 10.42.0.5:80"}},
	} {
		p := hostPort{Host: 8080, Pod: 80, Protocol: unix.IPPROTO_TCP}
		if c.hostIP != "" {
			p.HostIP = netip.MustParseAddr(c.hostIP)
		}
		var got []string
		for _, tr := range translations([]hostPort{p}, addrs) {
			got = append(got, tr.HostIP.String()+" "+tr.Pod.String())
		}
		if strings.Join(got, ",") != strings.Join(c.want, ",") {
			t.Errorf("host address %q: %v, want %v", c.hostIP, got, c.want)
		}
	}
}

// newPlugin makes a plugin without ranges, which refuses before it touches the kernel.
func newPlugin(t *testing.T) *Plugin {
	t.Helper()
	ledger, err := ipam.Open(t.TempDir(), "boot")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ledger.Close() })
	return New("node1", ledger, pods.NewTable("node1"), nil, slog.New(slog.DiscardHandler))
}

// fullTable is a table that can refuse to be written.
type fullTable struct {
	err   error
	ports []pods.HostPort
}

func (f *fullTable) SetHostPorts(ports []pods.HostPort) error {
	if f.err == nil {
		f.ports = ports
	}
	return f.err
}

// A pod is removed again if its host ports could not be removed from the table. The second attempt must not forget them.
func TestHostPortsAreRemovedAtLast(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("looks for the pod's interface, which needs root")
	}
	p, table := newPlugin(t), &fullTable{}
	p.table = table
	p.ports["c/eth0"] = []pods.HostPort{{Port: 80, Protocol: unix.IPPROTO_TCP, Pod: netip.MustParseAddrPort("10.42.0.2:80")}}
	if err := p.PublishHostPorts(); err != nil || len(table.ports) != 1 {
		t.Fatalf("published %v: %v", table.ports, err)
	}
	table.err = errors.New("no buffer space available")
	if err := p.remove("c/eth0"); !errors.Is(err, table.err) {
		t.Errorf("removed although the ports stay: %v", err)
	}
	table.err = nil
	if err := p.remove("c/eth0"); err != nil || len(table.ports) != 0 {
		t.Errorf("after the second attempt there are %v: %v", table.ports, err)
	}
}

func TestRefusals(t *testing.T) {
	p := newPlugin(t)
	for _, c := range []struct {
		name string
		req  cniclient.Request
		want string
	}{
		{"no configuration", cniclient.Request{Command: "ADD"}, `"code":6`},
		{"unknown command", cniclient.Request{Command: "NONSENSE", Config: []byte(`{}`)}, `"code":4`},
		{"no container", cniclient.Request{Command: "ADD", IfName: "eth0", Netns: "/x", Config: []byte(`{}`)}, `"code":4`},
		{"container with a slash", cniclient.Request{Command: "DEL", ContainerID: "a/b", IfName: "eth0", Config: []byte(`{}`)}, `"code":4`},
		{"interface name too long", cniclient.Request{Command: "ADD", ContainerID: "c", IfName: "a-name-with-16-c", Netns: "/x", Config: []byte(`{}`)}, `"code":4`},
		{"no namespace", cniclient.Request{Command: "ADD", ContainerID: "c", IfName: "eth0", Config: []byte(`{}`)}, `"code":4`},
		{"namespace gone", cniclient.Request{Command: "ADD", ContainerID: "c", IfName: "eth0", Netns: "/nonexistent", Config: []byte(`{}`)}, `"code":8`},
		{"no ranges", cniclient.Request{Command: "ADD", ContainerID: "c", IfName: "eth0", Netns: "/proc/self/ns/net", Config: []byte(`{"cniVersion":"0.4.0"}`)}, `"cniVersion":"0.4.0","code":11`},
		{"not attached", cniclient.Request{Command: "CHECK", ContainerID: "c", IfName: "eth0", Netns: "/x", Config: []byte(`{}`)}, `"code":3`},
	} {
		t.Run(c.name, func(t *testing.T) {
			resp := p.Handle(context.Background(), c.req)
			if !resp.Failed || !strings.Contains(string(resp.Output), c.want) {
				t.Errorf("answer %s, want an error with %s", resp.Output, c.want)
			}
		})
	}
	if leases := p.ledger.Leases(); len(leases) != 0 {
		t.Errorf("refused requests left leases: %v", leases)
	}
}

func TestInstall(t *testing.T) {
	dir := t.TempDir()
	for _, target := range []string{"/usr/bin/old", "/usr/bin/new", "/usr/bin/new"} {
		if err := InstallPlugin(dir, target); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(filepath.Join(dir, PluginName)); err != nil || got != target {
			t.Errorf("plugin leads to %q, %v, want %s", got, err, target)
		}
	}
	for range 2 {
		if err := WriteConf(dir, "/run/kedge/cni.sock"); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(filepath.Join(dir, confName))
	if err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join("testdata", confName))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("configuration:\n%s\nwant:\n%s", got, want)
	}
	for range 2 {
		if err := RemoveConf(dir); err != nil {
			t.Fatal(err)
		}
		if err := RemovePlugin(dir); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestKeyedMutex(t *testing.T) {
	var k keyedMutex
	var all sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)}
	for i := range 100 {
		key := []string{"a", "b"}[i%2]
		all.Go(func() {
			defer k.lock(key)()
			*counts[key]++ // the race detector watches
		})
	}
	all.Wait()
	if *counts["a"] != 50 || *counts["b"] != 50 || len(k.held) != 0 {
		t.Errorf("counts %d and %d, %d keys held", *counts["a"], *counts["b"], len(k.held))
	}
}
