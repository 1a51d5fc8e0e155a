package lan

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"kedge/internal/namespaces"
)

// These tests run in the machine's own network: nothing that they make may be
// visible there.

var (
	addrA4 = netip.MustParsePrefix("192.0.2.1/24")
	addrB4 = netip.MustParsePrefix("192.0.2.2/24")
	addrA6 = netip.MustParsePrefix("2001:db8::1/64")
	addrB6 = netip.MustParsePrefix("2001:db8::2/64")
)

// twoHosts makes a LAN with the hosts a and b. The LAN is closed after the test.
func twoHosts(t *testing.T) (l *LAN, a, b *Host) {
	t.Helper()
	requireRoot(t)
	before := links(t)
	l, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if after := links(t); !slices.Equal(before, after) {
			t.Errorf("the machine's interfaces: %v, before %v", after, before)
		}
	})
	if a, err = l.Host("a", addrA4, addrA6); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Host("b", addrB4, addrB6); err != nil {
		t.Fatal(err)
	}
	return l, a, b
}

// links lists interfaces with names as this package gives. Others may come and
// go meanwhile.
func links(t *testing.T) []string {
	t.Helper()
	all, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range all {
		if n := l.Attrs().Name; n == Bridge || strings.HasPrefix(n, "p0-") || strings.HasPrefix(n, "p1-") {
			names = append(names, n)
		}
	}
	return names
}

// serve answers every connection with "hello".
func serve(t *testing.T, h *Host, addr string) {
	t.Helper()
	l, err := h.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "hello")
			conn.Close()
		}
	}()
}

func ask(h *Host, addr string, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := h.Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	got, err := io.ReadAll(conn)
	if err == nil && string(got) != "hello" {
		err = fmt.Errorf("answer %q", got)
	}
	return err
}

const (
	patient   = 10 * time.Second       // for what must work
	impatient = 300 * time.Millisecond // for what must not
)

func TestHostsReachEachOther(t *testing.T) {
	_, a, b := twoHosts(t)
	for _, addr := range []string{"192.0.2.2:80", "[2001:db8::2]:80"} {
		serve(t, b, addr)
		if err := ask(a, addr, patient); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
	serve(t, a, "127.0.0.1:81")
	if err := ask(a, "127.0.0.1:81", patient); err != nil {
		t.Errorf("a host's own loopback: %v", err)
	}
	if err := ask(b, "127.0.0.1:81", impatient); err == nil {
		t.Error("hosts share a loopback interface")
	}
}

func TestCutAndRestore(t *testing.T) {
	_, a, b := twoHosts(t)
	serve(t, b, "192.0.2.2:80")
	for range 2 {
		if err := b.Cut(); err != nil {
			t.Fatal(err)
		}
		if err := ask(a, "192.0.2.2:80", impatient); err == nil {
			t.Error("a host is reached whose cable is cut")
		}
		if err := b.Restore(); err != nil {
			t.Fatal(err)
		}
		if err := ask(a, "192.0.2.2:80", patient); err != nil {
			t.Errorf("after restoring: %v", err)
		}
	}
}

func TestDropIsOneDirection(t *testing.T) {
	_, a, b := twoHosts(t)
	conn, err := b.ListenPacket("udp", "192.0.2.2:9")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	back, err := a.ListenPacket("udp", "192.0.2.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	arrives := func(from, to net.PacketConn, patience time.Duration) bool {
		from.WriteTo([]byte("x"), to.LocalAddr())
		to.SetReadDeadline(time.Now().Add(patience))
		_, _, err := to.ReadFrom(make([]byte, 8))
		return err == nil
	}
	to := netip.MustParsePrefix("192.0.2.2/32")
	if err := a.Drop(to); err != nil {
		t.Fatal(err)
	}
	if arrives(back, conn, impatient) {
		t.Error("a dropped packet arrives")
	}
	if !arrives(conn, back, patient) {
		t.Error("the other direction is dropped too")
	}
	if err := a.Undrop(to); err != nil {
		t.Fatal(err)
	}
	if !arrives(back, conn, patient) {
		t.Error("packets are dropped after Undrop")
	}
}

func TestMoveToAnotherAddress(t *testing.T) {
	_, a, b := twoHosts(t)
	moved := netip.MustParsePrefix("192.0.2.77/24")
	if err := b.DelAddr(addrB4); err != nil {
		t.Fatal(err)
	}
	if err := b.AddAddr(moved); err != nil {
		t.Fatal(err)
	}
	serve(t, b, "0.0.0.0:80")
	if err := ask(a, "192.0.2.77:80", patient); err != nil {
		t.Error(err)
	}
	if err := ask(a, "192.0.2.2:80", impatient); err == nil {
		t.Error("the old address still answers")
	}
}

func TestRouteThroughAnotherHost(t *testing.T) {
	l, a, b := twoHosts(t)
	far, err := l.Host("far", netip.MustParsePrefix("198.51.100.1/24"))
	if err != nil {
		t.Fatal(err)
	}
	// b has a foot in both networks and forwards.
	if err := b.AddAddr(netip.MustParsePrefix("198.51.100.2/24")); err != nil {
		t.Fatal(err)
	}
	err = b.Do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) })
	if err != nil {
		t.Fatal(err)
	}
	all := netip.MustParsePrefix("0.0.0.0/0")
	if err := a.Route(all, addrB4.Addr()); err != nil {
		t.Fatal(err)
	}
	if err := far.Route(all, netip.MustParseAddr("198.51.100.2")); err != nil {
		t.Fatal(err)
	}
	serve(t, far, "198.51.100.1:80")
	if err := ask(a, "198.51.100.1:80", patient); err != nil {
		t.Error(err)
	}
}

// helperVar makes the test program print the addresses that it sees.
const helperVar = "KEDGE_TEST_HELPER"

func TestHelperProcess(t *testing.T) {
	if os.Getenv(helperVar) == "" {
		t.Skip("runs only as a process of TestProcessesRunInTheirHost")
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("addresses:", addrs)
}

func TestProcessesRunInTheirHost(t *testing.T) {
	_, a, b := twoHosts(t)
	t.Setenv(helperVar, "1")
	for h, want := range map[*Host]string{a: "192.0.2.1/24", b: "192.0.2.2/24"} {
		out, err := h.Output(t.Context(), "/proc/self/exe", "-test.run", "^TestHelperProcess$")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(out), want) {
			t.Errorf("process on host %s sees %s, want %s", h.Name, out, want)
		}
	}
	cmd := exec.Command("/proc/self/exe", "-test.run", "^TestHelperProcess$")
	var out strings.Builder
	cmd.Stdout = &out
	if err := a.Start(cmd); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "192.0.2.1/24") {
		t.Errorf("started process sees %s", out.String())
	}
	if _, err := a.Output(t.Context(), "/nonexistent"); err == nil || !strings.Contains(err.Error(), "on host a") {
		t.Errorf("a program that does not exist: %v", err)
	}
}

// TestThreadsComeHome runs many functions inside hosts at once and checks that
// no thread is left in one.
func TestThreadsComeHome(t *testing.T) {
	_, a, b := twoHosts(t)
	home, err := namespaces.ProbeNetwork("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	const n = 64
	for i := range n {
		go func() {
			done <- []*Host{a, b}[i%2].Do(func() error {
				time.Sleep(time.Millisecond) // so that there are many threads
				return nil
			})
		}()
	}
	for range n {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		id, err := namespaces.ProbeNetwork("/proc/self/task/" + task.Name() + "/ns/net")
		if errors.Is(err, os.ErrNotExist) {
			continue // ended meanwhile
		}
		if err != nil || id != home {
			t.Errorf("thread %s is in namespace %v, want %v (%v)", task.Name(), id, home, err)
		}
	}
}

func TestRenumber(t *testing.T) {
	_, a, b := twoHosts(t)
	for _, via := range []netip.Addr{addrA4.Addr(), netip.MustParseAddr("192.0.2.9")} {
		if err := b.Route(netip.MustParsePrefix("198.51.100.0/24"), via); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Renumber(netip.MustParsePrefix("192.0.2.50/24")); err != nil {
		t.Fatal(err)
	}
	serve(t, b, "0.0.0.0:80")
	if err := ask(a, "192.0.2.50:80", patient); err != nil {
		t.Error(err)
	}
	if err := ask(a, "192.0.2.2:80", impatient); err == nil {
		t.Error("the old address still answers")
	}
	routes, err := b.Netlink().RouteList(nil, netlink.FAMILY_V4)
	if err != nil || len(routes) != 2 {
		t.Errorf("routes %v, %v; want the link's and the one added", routes, err)
	}
}

// TestAnotherProcess opens what exists by paths, as another process does.
func TestAnotherProcess(t *testing.T) {
	l, a, b := twoHosts(t)
	again, err := Open(l.Path())
	if err != nil {
		t.Fatal(err)
	}
	b2, err := again.Adopt("b", b.Path())
	if err != nil {
		t.Fatal(err)
	}
	if got := b2.Addrs(); len(got) != 2 || got[0] != addrB4 || got[1] != addrB6 {
		t.Errorf("addresses of the adopted host: %v", got)
	}
	serve(t, b, "192.0.2.2:80")
	if err := b2.Cut(); err != nil {
		t.Fatal(err)
	}
	if err := ask(a, "192.0.2.2:80", impatient); err == nil {
		t.Error("the adopted host is not cut")
	}
	if err := b2.Restore(); err != nil {
		t.Fatal(err)
	}
	c, err := again.Host("c", netip.MustParsePrefix("192.0.2.3/24"))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, c, "192.0.2.3:80")
	for _, addr := range []string{"192.0.2.2:80", "192.0.2.3:80"} {
		if err := ask(a, addr, patient); err != nil {
			t.Error(err)
		}
	}
	if err := again.Disown(); err != nil {
		t.Fatal(err)
	}
	if err := ask(a, "192.0.2.2:80", patient); err != nil {
		t.Errorf("after Disown: %v", err)
	}
	if _, err := again.Host("d"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a host on a disowned LAN: %v", err)
	}
}

func TestAttach(t *testing.T) {
	l, _, b := twoHosts(t)
	// The machine that runs the tests has addresses too.
	if err := b.Renumber(netip.MustParsePrefix("10.213.99.2/24")); err != nil {
		t.Fatal(err)
	}
	const name = "kdgtest0"
	t.Cleanup(func() {
		for range 2 { // the second time it is gone
			if err := Detach(name); err != nil {
				t.Error(err)
			}
		}
	})
	if err := l.Attach(name, netip.MustParsePrefix("10.213.99.1/24")); err != nil {
		t.Fatal(err)
	}
	serve(t, b, "10.213.99.2:80")
	conn, err := net.DialTimeout("tcp", "10.213.99.2:80", patient)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestClosing(t *testing.T) {
	l, a, b := twoHosts(t)
	if _, err := l.Host("a"); err == nil {
		t.Error("two hosts with one name")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	again, err := l.Host("a", addrA4)
	if err != nil {
		t.Fatalf("a host with the name of a closed one: %v", err)
	}
	serve(t, b, "192.0.2.2:80")
	if err := ask(again, "192.0.2.2:80", patient); err != nil {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Host("late"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a host on a closed LAN: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Errorf("closing a host of a closed LAN: %v", err)
	}
}

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: creates network namespaces")
	}
	ns, err := namespaces.NewNetwork()
	if err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	ns.Close()
}
