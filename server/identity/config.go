package identity

import (
	"net"
	"net/netip"
	"path/filepath"
	"strconv"

	"kedge/internal/joining"
)

// Config is the configuration of a server's credentials. Package server derives it from its own validated
// configuration.
type Config struct {
	Dir      string // <data-dir>/server: keys, certificates, tokens
	NodeName string // name of the node on this machine
	// Established means that the server has a datastore: missing essential credentials are then lost, and must
	// not be created again.
	Established bool

	BindAddress      netip.Addr   // of the API; the zero Addr means all addresses
	HTTPSPort        int          // of the API
	AdvertiseAddress netip.Addr   // the address by which other machines reach the API
	NodeIPs          []netip.Addr // of this machine
	TLSSANs          []string     // additional names and addresses for the API's certificate
	ServiceIP        netip.Addr   // address of the service "kubernetes"
	ClusterDomain    string

	Kubeconfig     string // path of the administrator's kubeconfig
	KubeconfigMode uint32
	KubeconfigName string         // of the cluster, the context and the user in it
	Token          joining.Secret // an administrator's own, with which agents may join; empty: none
	ServerToken    joining.Secret // likewise servers
}

// tlsDir is the directory of keys and certificates.
func (c Config) tlsDir() string { return tlsDir(c.Dir) }

func tlsDir(dir string) string { return filepath.Join(dir, "tls") }

// url returns the URL of this machine's API for clients on this machine.
func (c Config) url() string {
	host := "127.0.0.1"
	if c.BindAddress.IsValid() && !c.BindAddress.IsUnspecified() {
		host = c.BindAddress.String()
	}
	return "https://" + net.JoinHostPort(host, strconv.Itoa(c.HTTPSPort))
}
