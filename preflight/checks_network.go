package preflight

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func checkLinks(_ context.Context, c Config, p probes) []finding {
	kinds := []struct{ kind, option, purpose, remedy string }{
		{"veth", "CONFIG_VETH", "no pod can have a network", ""},
	}
	if c.VXLAN {
		kinds = append(kinds, struct{ kind, option, purpose, remedy string }{
			"vxlan", "CONFIG_VXLAN", "pods of different nodes cannot connect over VXLAN", ", or choose another backend with --flannel-backend",
		})
	}
	var found []finding
	var names []string
	for _, k := range kinds {
		names = append(names, k.kind)
		if err := p.tryLink(k.kind); err != nil {
			found = append(found, fail(fmt.Sprintf("cannot create %s interfaces (%v): %s", k.kind, err, k.purpose),
				fmt.Sprintf("use a kernel with %s, or load the module %s%s", k.option, k.kind, k.remedy))...)
		}
	}
	if found == nil {
		found = fine("interfaces of kind %s", strings.Join(names, ", "))
	}
	return found
}

func checkNftables(_ context.Context, _ Config, p probes) []finding {
	var missing []string
	var last error
	for _, f := range nftFeatures() {
		if err := p.tryNft(f); err != nil {
			missing, last = append(missing, f.name), err
		}
	}
	if len(missing) == 0 {
		return fine("all required features")
	}
	if len(missing) == len(nftFeatures()) {
		return fail(fmt.Sprintf("nftables does not work: %v", last), "use a kernel of version 5.13 or later with CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET and CONFIG_NFT_*, or load the module nf_tables")
	}
	return fail("nftables lacks: "+strings.Join(missing, ", "), "use a kernel of version 5.13 or later with all options CONFIG_NFT_*")
}

func checkConntrack(_ context.Context, _ Config, p probes) []finding {
	if err := p.tryConntrack(); err != nil {
		return fail(fmt.Sprintf("connections cannot be tracked: %v", err), "use a kernel with CONFIG_NF_CONNTRACK and CONFIG_NF_CT_NETLINK, or load the module nf_conntrack_netlink")
	}
	return fine("connection tracking")
}

func checkFirewall(_ context.Context, c Config, p probes) []finding {
	drops, err := p.dropsPods(c)
	if err != nil {
		return nil // reported by the check of nftables
	}
	var found []finding
	for _, d := range drops {
		found = append(found, warn("a firewall is in the way of pods: "+d.String(), d.Remedy(c.OwnLinks))...)
	}
	if len(found) > 0 {
		return found
	}
	return fine("no nftables chain of another program drops packets of pods")
}

func checkDefaultRoute(_ context.Context, _ Config, p probes) []finding {
	found, err := p.defaultRoute()
	if err != nil || !found {
		return warn("there is no default route: images cannot be pulled, and the node's address cannot be determined",
			"connect the machine, or give the address with --node-ip and provide images as archives")
	}
	return fine("there is one")
}

// checkRanges looks for networks that the machine reaches and would lose, such as a company's
// network behind a tunnel, or the pods of a second kedge on this machine.
func checkRanges(_ context.Context, c Config, p probes) []finding {
	routes, err := p.routes()
	if err != nil {
		return warn("the machine's routes cannot be read: "+err.Error(), "run kedge as root")
	}
	for _, r := range routes {
		if r.to.Bits() == 0 || !leadsAway(r, c) {
			continue
		}
		for _, mine := range c.Ranges {
			if mine.Overlaps(r.to) {
				return warn(fmt.Sprintf("range %s overlaps with %s, which this machine reaches through %s: one of the two will not be reachable", mine, r.to, r.link),
					"choose other ranges with --cluster-cidr and --service-cidr")
			}
		}
	}
	return fine("no route of this machine leads into the ranges of pods and services")
}

// leadsAway reports whether a route leads to another network. A route to the loopback interface
// leads to this machine or is kedge's; a route without an interface refuses packets, as kedge's
// route for unused addresses of pods does.
func leadsAway(r route, c Config) bool {
	if r.link == "" || r.link == "lo" || c.Running > 0 && r.ours {
		return false
	}
	return c.OwnLinks == "" || !strings.HasPrefix(r.link, c.OwnLinks)
}

// checkHostsFile looks for /etc/hosts, which minimal systems may lack. The runtime makes every
// pod's file from it.
func checkHostsFile(_ context.Context, _ Config, p probes) []finding {
	return needFile(p, "/etc/hosts", "no pod starts", "127.0.0.1 localhost")
}

// checkUsersFile looks for /etc/passwd, in which the kubelet looks for a user of its own.
func checkUsersFile(_ context.Context, _ Config, p probes) []finding {
	return needFile(p, "/etc/passwd", "the kubelet does not start", "root:x:0:0:root:/root:/bin/sh")
}

func needFile(p probes, path, without, line string) []finding {
	if err := p.readable(path); err != nil {
		return fail(fmt.Sprintf("cannot read %s, and without it %s: %v", path, without, err), "create it, with the line: "+line)
	}
	return fine("%s is there", path)
}

func checkPorts(_ context.Context, c Config, p probes) []finding {
	if c.Running > 0 {
		return fine("in use by this node's kedge, process %d", c.Running)
	}
	var found []finding
	for _, port := range c.Ports {
		err := p.listen(port.Protocol, net.JoinHostPort("", strconv.Itoa(port.Number)))
		switch {
		case err == nil:
		case errors.Is(err, unix.EADDRINUSE):
			found = append(found, fail(fmt.Sprintf("port %d/%s, for the %s, is in use", port.Number, port.Protocol, port.Purpose),
				"stop the program that uses it (another Kubernetes, an old kedge?), or choose another port")...)
		default:
			found = append(found, fail(fmt.Sprintf("port %d/%s, for the %s, cannot be used: %v", port.Number, port.Protocol, port.Purpose, err), "run kedge as root")...)
		}
	}
	if found == nil {
		found = fine("all free")
	}
	return found
}
