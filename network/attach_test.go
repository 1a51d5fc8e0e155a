package network

import (
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// TestSameSandboxInAnotherNamespace: the runtime created the namespace again, for example
// because it crashed before it could send DEL for the first attachment.
func TestSameSandboxInAnotherNamespace(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p, other := w.pod(port{8000, 80, "TCP", ""}), w.pod()
	p.ns = w.namespace()
	addrs, err := p.call("ADD", port{8000, 80, "TCP", ""})
	w.must(err)
	if addrs[0] != p.addrs[0] {
		t.Errorf("addresses %v, before %v", addrs, p.addrs)
	}
	w.serve(p.ns.Do, "tcp", at(addrs[0], 80))
	w.wantSeen("pod to pod", other.ns.Do, "tcp", at(addrs[0], 80), other.addrs[0].String())
	w.wantSeen("host port", w.outside.Do, "tcp", "192.0.2.1:8000", "192.0.2.9")
	if _, err := p.call("CHECK"); err != nil {
		t.Error(err)
	}
}

func TestHalfMadeAttachmentIsFinished(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := w.pod()
	w.stop()
	// The state after a crash right after the creation of the interfaces.
	w.must(p.ns.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			if err := netlink.AddrDel(link, &a); err != nil {
				return err
			}
		}
		return netlink.LinkSetDown(link)
	}))
	w.start()
	if _, err := p.call("CHECK"); err != nil {
		t.Errorf("after the start: %v", err)
	}
	w.serve(p.ns.Do, "tcp", at(p.addrs[0], 80))
	w.wantSeen("node to pod", here, "tcp", at(p.addrs[0], 80), "10.42.0.1")
}

func TestFailedAddLeavesNothing(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := &pod{w: w, id: "taken", ns: w.namespace()}
	w.must(p.ns.Do(func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth1"})
	}))
	if _, err := p.call("ADD", port{8000, 80, "TCP", ""}); err == nil || !strings.Contains(err.Error(), "another interface of this name") {
		t.Errorf("ADD to a pod that has an eth0: %v", err)
	}
	if links := podLinks(t); len(links) != 0 {
		t.Errorf("interfaces left: %v", links)
	}
	if ports := w.network.plugin.HostPorts(); len(ports) != 0 {
		t.Errorf("host ports left: %v", ports)
	}
	w.pod(port{8000, 80, "TCP", ""}) // the port is free again
}

func TestIPv6SwitchedOffForNewInterfaces(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := &pod{w: w, id: "no6", ns: w.namespace()}
	w.must(p.ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0)
	}))
	addrs, err := p.call("ADD")
	w.must(err)
	w.serve(p.ns.Do, "tcp", at(addrs[1], 80))
	w.wantSeen("node to pod", here, "tcp", at(addrs[1], 80), "fd42::1")
	if _, err := p.call("DEL"); err != nil {
		t.Error(err)
	}
}
