// Command coredns is CoreDNS with the plugins of a cluster's resolver, for comparing kedge's resolver with it.
// It is a module of its own, so that its dependencies are not in kedge's go.mod.
package main

import (
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/metrics"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
)

func init() {
	// The plugins have the order of CoreDNS's own executable.
	dnsserver.Directives = []string{"bind", "health", "prometheus", "errors", "cache", "loadbalance", "kubernetes", "forward"}
}

func main() { coremain.Run() }
