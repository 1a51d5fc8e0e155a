package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"kedge/internal/hostfirewall"
)

// nameServers has the servers in a file.
type nameServers struct {
	file string
	list []netip.Addr
	own  []netip.Addr // addresses of the cluster's DNS
	used bool         // another program listens on port 53 of loopback
}

func judgeNameServers(_ *subject, n nameServers) []Finding {
	if len(n.list) == 0 {
		return []Finding{{Level: Warning, What: fmt.Sprintf("%s has no name server: names outside of the cluster are not resolved, and images cannot be pulled by name", n.file),
			Remedy: "add a line \"nameserver ADDRESS\" to it, or give another file with --resolv-conf"}}
	}
	var found []Finding
	for _, a := range n.list {
		switch {
		case slices.Contains(n.own, a):
			found = append(found, Finding{Level: Problem, What: fmt.Sprintf("%s has %s, the cluster's own DNS, as name server of the host: queries go in a circle", n.file, a),
				Remedy: "put a name server outside of the cluster into it, or give another file with --resolv-conf"})
		case a.IsLoopback() && !n.used:
			found = append(found, Finding{Level: Problem, What: fmt.Sprintf("%s has %s, this machine itself, as name server, and no program answers there", n.file, a),
				Remedy: "start the resolver (systemctl status systemd-resolved), or put another name server into the file"})
		}
	}
	return found
}

// parseNameServers returns the name servers in the text of a resolv.conf.
func parseNameServers(text string) (list []netip.Addr) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			list = append(list, a)
		}
	}
	return list
}

// heldPort is a port of kedge that some process uses.
type heldPort struct {
	Port
	pid  int    // 0 if the process is not known
	name string // of the process
	ours bool   // the process is the running kedge
}

func judgePorts(s *subject, held []heldPort) (found []Finding) {
	for _, p := range held {
		if p.ours {
			continue
		}
		by, stop := "a process that is not visible here (of another container?)", "find the process with \"ss -lntup\" on the host and stop it"
		if p.pid > 0 {
			by, stop = fmt.Sprintf("%s (process %d)", p.name, p.pid), fmt.Sprintf("stop %s", p.name)
			if p.name == "kedge" {
				by += ", which has another run directory or does not answer"
			}
		}
		if p.Flag != "" {
			stop += ", or choose another port with " + p.Flag
		}
		found = append(found, Finding{Level: Problem, Subject: fmt.Sprintf("port %d/%s", p.Number, p.Protocol),
			What: fmt.Sprintf("the port of the %s is in use by %s", p.Purpose, by), Remedy: stop})
	}
	return found
}

// socket is a line of /proc/net/tcp and its like.
type socket struct {
	addr  netip.AddrPort
	inode string
}

// parseSockets returns the sockets of the text of /proc/net/tcp, tcp6, udp or udp6 that wait for packets or connections
// from outside.
func parseSockets(text string, tcp bool) (list []socket) {
	const listening = "0A"
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 10 || tcp && f[3] != listening {
			continue
		}
		if a, ok := parseSocketAddr(f[1]); ok {
			list = append(list, socket{a, f[9]})
		}
	}
	return list
}

// parseSocketAddr reads an address of /proc/net: words of four bytes in the order of the machine, and the port.
func parseSocketAddr(text string) (netip.AddrPort, bool) {
	host, port, ok := strings.Cut(text, ":")
	var number uint16
	if _, err := fmt.Sscanf(port, "%x", &number); err != nil || !ok || len(host)%8 != 0 {
		return netip.AddrPort{}, false
	}
	var raw []byte
	for ; len(host) > 0; host = host[8:] {
		var b [4]byte
		if _, err := fmt.Sscanf(host[:8], "%02x%02x%02x%02x", &b[3], &b[2], &b[1], &b[0]); err != nil {
			return netip.AddrPort{}, false
		}
		raw = append(raw, b[:]...)
	}
	a, ok := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(a, number), ok
}

// firewall has the chains of other programs that drop packets.
type firewall struct {
	pods   []hostfirewall.Drop            // packets of pods
	ports  map[string][]hostfirewall.Drop // packets to ports of kedge, by the words for the port
	legacy []legacyChain
}

// legacyChain is a built-in chain of the kernel's older packet filter, iptables-legacy.
type legacyChain struct {
	name  string // INPUT or FORWARD
	drops bool   // by policy
	rules int
}

func judgeFirewall(s *subject, f firewall) (found []Finding) {
	for _, d := range f.pods {
		found = append(found, Finding{Level: dropLevel(d), What: "packets of pods are dropped: " + d.String(),
			Remedy: d.Remedy(s.Preflight.OwnLinks)})
	}
	var ports []string
	for p := range f.ports {
		ports = append(ports, p)
	}
	slices.Sort(ports)
	for _, p := range ports {
		for _, d := range f.ports[p] {
			found = append(found, Finding{Level: Warning, What: fmt.Sprintf("connections of other machines to %s are dropped: %s", p, d),
				Remedy: fmt.Sprintf("let it accept %s from the machines that need it (\"nft list chain %s %s %s\" shows the rules)", p, d.Family, d.Table, d.Chain)})
		}
	}
	for _, c := range f.legacy {
		if !c.drops {
			continue
		}
		of, flag := "packets of pods", "-o"
		if c.name == "INPUT" {
			of, flag = "packets of pods to this machine, to its DNS for example,", "-i"
		}
		level, unless := Problem, ""
		if c.rules > 0 {
			level, unless = Warning, fmt.Sprintf(" unless one of its %s accepts them", plural(c.rules, "rule"))
		}
		found = append(found, Finding{Level: level, What: fmt.Sprintf("chain %s of iptables-legacy drops %s by policy%s", c.name, of, unless),
			Remedy: fmt.Sprintf("iptables-legacy -I %s %s %s+ -j ACCEPT, or iptables-legacy -P %s ACCEPT", c.name, flag, s.Preflight.OwnLinks, c.name)})
	}
	return found
}

func dropLevel(d hostfirewall.Drop) Level {
	if d.Perhaps {
		return Warning
	}
	return Problem
}

// link is a network interface.
type link struct {
	name string
	mtu  int
}

// mtus has the MTU of the interface that leads to other machines, and of links of kedge.
type mtus struct {
	uplink  link
	tunnels []link
	pods    []link
}

func judgeMTU(s *subject, m mtus) (found []Finding) {
	if m.uplink.mtu == 0 {
		return nil
	}
	room := m.uplink.mtu
	for _, t := range m.tunnels {
		room = m.uplink.mtu - s.Overhead
		if t.mtu > room {
			found = append(found, Finding{Level: Problem,
				What:   fmt.Sprintf("%s has an MTU of %d, and %s one of %d, of which the tunnel needs %d: large packets between nodes are lost", t.name, t.mtu, m.uplink.name, m.uplink.mtu, s.Overhead),
				Remedy: fmt.Sprintf("ip link set %s mtu %d, or %s", m.uplink.name, t.mtu+s.Overhead, s.restart())})
		}
	}
	var large []string
	for _, p := range m.pods {
		if p.mtu > room {
			large = append(large, p.name)
		}
	}
	if len(large) > 0 {
		found = append(found, Finding{Level: Warning,
			What:   fmt.Sprintf("the links of %s (%s) have a larger MTU than the %d that fit through %s: large packets are refused or lost", plural(len(large), "pod"), some(large), room, m.uplink.name),
			Remedy: fmt.Sprintf("%s, and create these pods again (\"kedge kubectl rollout restart\"): a pod keeps the MTU of its start", s.restart())})
	}
	return found
}
