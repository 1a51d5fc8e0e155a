// Command standalone runs the resolver as a process of its own with any API server: to
// measure it, and to compare its answers with those of others. It is not part of the
// product.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/dns"
	"kedge/internal/footprint"
	"kedge/internal/informertrim"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "standalone:", err)
		os.Exit(1)
	}
}

func run() error {
	api := flag.String("api", "http://127.0.0.1:8080", "URL of the API server, which must require no credentials")
	addresses := flag.String("addresses", "10.43.0.10", "addresses to answer at, separated by commas")
	ranges := flag.String("ranges", "10.42.0.0/16,10.43.0.0/16", "ranges of pods and services")
	resolvConf := flag.String("resolv-conf", "", "file with the name servers for outside names")
	flag.Parse()
	cfg := dns.DefaultConfig()
	cfg.ResolvConf = *resolvConf
	for a := range strings.SplitSeq(*addresses, ",") {
		addr, err := netip.ParseAddr(a)
		if err != nil {
			return err
		}
		cfg.Addresses = append(cfg.Addresses, addr)
	}
	for r := range strings.SplitSeq(*ranges, ",") {
		prefix, err := netip.ParsePrefix(r)
		if err != nil {
			return err
		}
		cfg.Ranges = append(cfg.Ranges, prefix)
	}
	if err := cfg.Validate(); err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(&rest.Config{Host: *api, QPS: -1})
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	watches := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(informertrim.Transform)) // as a node has them
	r, err := dns.New(cfg, watches, client, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	watches.StartWithContext(ctx)
	defer watches.Shutdown()
	footprint.Boot() // as the product does, which then releases the memory of the start
	return r.Run(ctx, func() {
		time.AfterFunc(settleAfter, func() {
			if err := footprint.Settle(); err != nil {
				fmt.Fprintln(os.Stderr, "standalone:", err)
			}
			footprint.Tend(ctx)
		})
	})
}

// settleAfter is shorter than the product's ten seconds, to keep measurements short.
const settleAfter = time.Second
