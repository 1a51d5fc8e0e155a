package identity

import (
	"net"
	"net/netip"
	"path/filepath"
	"strconv"

	"kedge/internal/token"
)

// Config is what a server's credentials are made of. Package server fills it from its
// own configuration, which was found valid.
type Config struct {
	Dir      string // <data-dir>/server: keys, certificates, tokens
	NodeName string // of the node on this machine

	BindAddress      netip.Addr   // of the API; the zero Addr means all addresses
	HTTPSPort        int          // of the API
	AdvertiseAddress netip.Addr   // the address by which other machines reach the API
	NodeIPs          []netip.Addr // of this machine
	TLSSANs          []string     // further names and addresses for the API's certificate
	ServiceIP        netip.Addr   // of the service "kubernetes"
	ClusterDomain    string

	Kubeconfig     string // where the administrator's kubeconfig is written
	KubeconfigMode uint32
	Token          token.Secret // an administrator's own, with which agents may join; empty: none
	ServerToken    token.Secret // likewise servers
}

// tlsDir is where keys and certificates are.
func (c Config) tlsDir() string { return tlsDir(c.Dir) }

func tlsDir(dir string) string { return filepath.Join(dir, "tls") }

// url is by which this machine reaches its own API.
func (c Config) url() string {
	host := "127.0.0.1"
	if c.BindAddress.IsValid() && !c.BindAddress.IsUnspecified() {
		host = c.BindAddress.String()
	}
	return "https://" + net.JoinHostPort(host, strconv.Itoa(c.HTTPSPort))
}
