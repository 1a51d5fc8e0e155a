// Command coredns is CoreDNS with the plugins that a cluster's resolver has, for
// measuring kedge's beside it. It is a module of its own: nothing of it comes into
// kedge's go.mod.
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
	// The order of the plugins is that of CoreDNS's own executable.
	dnsserver.Directives = []string{"bind", "health", "prometheus", "errors", "cache", "loadbalance", "kubernetes", "forward"}
}

func main() { coremain.Run() }
