package dns

import (
	"context"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

// probeTimeout is generous for a name that is answered from memory.
const probeTimeout = 2 * time.Second

// probe queries the version of the DNS specification over UDP.
func probe(ctx context.Context, a netip.Addr, domain string) error {
	m := new(dns.Msg)
	m.SetQuestion("dns-version."+domain+".", dns.TypeTXT)
	c := &dns.Client{Timeout: probeTimeout}
	_, _, err := c.ExchangeContext(ctx, m, address(a, port))
	return err
}
