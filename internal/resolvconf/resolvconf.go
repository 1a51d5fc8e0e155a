// Package resolvconf finds the file with the name servers that pods can use.
//
// It is not a resolver. It may be imported by agent, dns and main.
package resolvconf

import (
	"net/netip"
	"os"
	"strings"
)

// candidates are where hosts keep their name servers. On hosts with systemd-resolved
// the first names only a stub on loopback, which pods cannot reach; the second has
// the servers behind it.
var candidates = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// Find returns the first file that names a server outside this machine, or "" when
// there is none: pods then get no name servers from the host, rather than ones that
// do not answer.
func Find() string { return find(candidates) }

func find(files []string) string {
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && usable(string(data)) {
			return f
		}
	}
	return ""
}

// usable reports whether one of the name servers is not on loopback.
func usable(content string) bool {
	for line := range strings.Lines(content) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(fields[1]); err == nil && !a.IsLoopback() && !a.IsUnspecified() {
			return true
		}
	}
	return false
}
