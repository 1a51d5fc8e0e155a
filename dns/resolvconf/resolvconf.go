// Package resolvconf finds the file of the host with name servers that pods can use.
//
// It resolves nothing. It may be imported by dns and main.
package resolvconf

import (
	"net/netip"
	"os"
	"strings"
)

// candidates are the files in which hosts keep their name servers. With systemd-resolved
// the first has only a stub on loopback, which pods cannot reach, and the second has the
// servers behind the stub.
var candidates = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// Find returns the first file with a server outside this machine, or "" when there is no
// such file: then pods get no name servers from the host, which is better than servers
// that do not answer.
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
