package identity

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"kedge/datastore"
	"kedge/internal/atomicfile"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/internal/token"
	"kedge/server/bootstrap"
)

// Identity is the credentials of a control plane: made at the first boot, kept
// from then on. It holds paths, not secrets.
type Identity struct {
	ServerCA *pki.Authority // signs the API's certificate
	// KubeletCA signs what the kubelets serve with. It is not the API's, so that no
	// node's certificate can ever be shown to a client of the API.
	KubeletCA *pki.Authority
	ClientCA  *pki.Authority // signs who calls: administrators, nodes, the API server itself
	ProxyCA   *pki.Authority // signs the aggregator's front proxy
	PeerCA    *pki.Authority // signs what the servers' stores show each other, and nothing else

	Serving        pki.Pair // the API's certificate
	KubeletClient  pki.Pair // the API server's when it calls kubelets
	ProxyClient    pki.Pair // the aggregator's when it calls extension API servers
	Admin          pki.Pair // cluster-admin, for the kubeconfig
	KubeletServing pki.Pair // the certificate of this machine's kubelet
	NodeClient     pki.Pair // of this machine's node, with the kubelet's key, towards the other servers
	Peer           pki.Pair // of this server's store, towards the others

	ServiceAccountKey string // signs service account tokens
	EncryptionConfig  string // names the key that encrypts secrets at rest

	URL string // of the API, for the kubeconfig
}

// Files of the server's directory that are named more than once.
const (
	serviceAccountKey = "service-account.key" // in tls
	servingKubelet    = "serving-kubelet"
	encryptionConfig  = "encryption-config.yaml"
	tokenFile         = "token"
	serverTokenFile   = "server-token"
	peerCA            = "peer-ca"
	peerLeaf          = "peer"
)

// authorities are the names of the cluster's authorities, the API's first.
var authorities = []string{"server-ca", "kubelet-ca", "client-ca", "request-header-ca", peerCA}

// Prepare makes whatever of the identity does not exist yet, renews leaf
// certificates that need it, and writes the administrator's kubeconfig. It is
// idempotent, and safe to run again after a crash at any point: no file is seen
// half-written, and nothing that other files rest on is ever replaced.
func Prepare(cfg Config, now time.Time) (*Identity, error) {
	dir := cfg.tlsDir()
	for _, d := range []string{cfg.Dir, dir} {
		if err := atomicfile.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("prepare the server directory: %w", err)
		}
	}
	id := &Identity{
		ServiceAccountKey: filepath.Join(dir, serviceAccountKey),
		EncryptionConfig:  filepath.Join(cfg.Dir, encryptionConfig),
		URL:               cfg.url(),
	}
	for i, ca := range []**pki.Authority{&id.ServerCA, &id.KubeletCA, &id.ClientCA, &id.ProxyCA, &id.PeerCA} {
		var err error
		if *ca, err = pki.EnsureAuthority(dir, authorities[i], now); err != nil {
			return nil, err
		}
	}
	if _, err := pki.EnsureKey(id.ServiceAccountKey); err != nil {
		return nil, err
	}
	if err := id.leaves(cfg, now); err != nil {
		return nil, err
	}
	if err := ensureEncryptionConfig(id.EncryptionConfig); err != nil {
		return nil, err
	}
	// What earlier versions made for kube-apiserver has no use any more.
	if err := os.Remove(filepath.Join(cfg.Dir, "authentication-config.yaml")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for name, secret := range map[string]token.Secret{tokenFile: cfg.Token, serverTokenFile: cfg.ServerToken} {
		if err := ensureToken(filepath.Join(cfg.Dir, name), secret, id.ServerCA.Hash()); err != nil {
			return nil, err
		}
	}
	return id, id.writeKubeconfig(cfg)
}

// leafOf is a certificate to be made.
type leafOf struct {
	ca   *pki.Authority
	name string
	leaf pki.Leaf
	into *pki.Pair
}

// leaves makes the leaf certificates.
func (id *Identity) leaves(cfg Config, now time.Time) error {
	for _, l := range append(id.serving(cfg), []leafOf{
		{id.ClientCA, "client-kube-apiserver", pki.Leaf{CommonName: bootstrap.KubeletClientUser, Client: true}, &id.KubeletClient},
		{id.ClientCA, "client-admin", pki.Leaf{CommonName: "system:admin", Organizations: []string{"system:masters"}, Client: true}, &id.Admin},
		{id.PeerCA, peerLeaf, pki.Leaf{CommonName: cfg.NodeName, DNSNames: []string{datastore.PeerServerName}, Client: true, Server: true}, &id.Peer},
		{id.ProxyCA, "client-auth-proxy", pki.Leaf{CommonName: ProxyUser, Client: true}, &id.ProxyClient},
	}...) {
		pair, err := l.ca.EnsureLeaf(cfg.tlsDir(), l.name, l.leaf, now)
		if err != nil {
			return err
		}
		*l.into = pair
	}
	return id.nodeClient(cfg, now)
}

// serving are the certificates with this machine's addresses in them.
func (id *Identity) serving(cfg Config) []leafOf {
	names := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc",
		"kubernetes.default.svc." + cfg.ClusterDomain, cfg.NodeName}
	ips := []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback, cfg.ServiceIP.AsSlice(), cfg.AdvertiseAddress.AsSlice()}
	var nodeIPs []net.IP
	for _, a := range cfg.NodeIPs {
		nodeIPs = append(nodeIPs, a.AsSlice())
	}
	ips = append(ips, nodeIPs...)
	for _, san := range cfg.TLSSANs {
		if ip := net.ParseIP(san); ip != nil {
			ips = append(ips, ip)
		} else {
			names = append(names, san)
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	ips = slices.CompactFunc(slices.SortedFunc(slices.Values(ips), func(a, b net.IP) int { return strings.Compare(a.String(), b.String()) }), net.IP.Equal)
	return []leafOf{
		{id.ServerCA, "serving-kube-apiserver", pki.Leaf{CommonName: "kube-apiserver", DNSNames: names, IPs: ips, Server: true}, &id.Serving},
		{id.KubeletCA, servingKubelet, pki.Leaf{CommonName: joining.NodeUser(cfg.NodeName), Organizations: []string{"system:nodes"},
			DNSNames: []string{cfg.NodeName, "localhost"}, IPs: append([]net.IP{net.IPv4(127, 0, 0, 1), joining.NodeAddress(cfg.NodeName).AsSlice()}, nodeIPs...), Server: true}, &id.KubeletServing},
	}
}

// nodeClient makes the certificate with which this machine's node calls the other
// servers, for the key that proves the node. It is signed anew at each start.
func (id *Identity) nodeClient(cfg Config, now time.Time) error {
	id.NodeClient = pki.Pair{CertFile: filepath.Join(cfg.tlsDir(), "client-node.crt"), KeyFile: id.KubeletServing.KeyFile, Renewed: true}
	key, err := pki.EnsureKey(id.NodeClient.KeyFile)
	if err != nil {
		return err
	}
	chain, err := id.ClientCA.Sign(&key.PublicKey, pki.Leaf{CommonName: joining.NodeUser(cfg.NodeName), Organizations: []string{"system:nodes"}, Client: true}, pki.LeafLife, now)
	if err != nil {
		return fmt.Errorf("sign %s: %w", id.NodeClient.CertFile, err)
	}
	return atomicfile.Write(id.NodeClient.CertFile, chain, 0o644)
}

// ProxyUser is who the aggregator is when it calls an extension API server.
const ProxyUser = "system:auth-proxy"

// ensureEncryptionConfig makes the key for secrets at rest at the first boot.
// An existing file is never replaced: its key is the only one that opens what is
// stored. "identity" comes last so that a store from before encryption stays
// readable; it is never used to write.
func ensureEncryptionConfig(path string) error {
	if _, err := os.Stat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key := make([]byte, 32)
	rand.Read(key) // never fails (crypto/rand)
	return atomicfile.Write(path, fmt.Appendf(nil, `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - secretbox:
      keys:
      - name: key1
        secret: %s
  - identity: {}
`, base64.StdEncoding.EncodeToString(key)), 0o600)
}

// ensureToken writes the token with the secret that an administrator has fixed, in
// the form that names the cluster's authority, and removes that of one who has no more.
func ensureToken(path string, given token.Secret, caHash string) error {
	if given == "" {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the token of an earlier start: %w", err)
		}
		return nil
	}
	t := token.Token{CAHash: caHash, ID: token.Preshared, Secret: given}
	_, err := atomicfile.WriteIfChanged(path, []byte(t.Reveal()+"\n"), 0o600)
	return err
}

// PeerConfig is how the store of the server in dir meets others: with a port, and with
// what [Prepare] signs.
func PeerConfig(dir string, port uint16, addresses []netip.Addr) datastore.PeerConfig {
	tls := tlsDir(dir)
	return datastore.PeerConfig{
		Port: port, CAFile: filepath.Join(tls, peerCA+".crt"),
		CertFile: filepath.Join(tls, peerLeaf+".crt"), KeyFile: filepath.Join(tls, peerLeaf+".key"), Addresses: addresses,
	}
}

// Exists reports whether dir is a server's that has its cluster's credentials.
func Exists(dir string) bool {
	_, err := os.Stat(AuthorityFile(dir))
	return err == nil
}

// AuthorityFile is where the server in dir has the certificate of the API's authority, by
// which clusters are told apart.
func AuthorityFile(dir string) string { return filepath.Join(tlsDir(dir), authorities[0]+".crt") }

// NodeKeyFile is where the server in dir has the key that proves its node. It is the
// first file that a machine has which is to become a server.
func NodeKeyFile(dir string) string { return filepath.Join(tlsDir(dir), servingKubelet+".key") }

// SharedFiles are what every server of a cluster has the same of, below its directory.
// The optional ones are there only where an administrator has fixed secrets.
func SharedFiles() (files, optional []string) {
	for _, ca := range authorities {
		files = append(files, filepath.Join("tls", ca+".crt"), filepath.Join("tls", ca+".key"))
	}
	return append(files, filepath.Join("tls", serviceAccountKey), encryptionConfig), []string{tokenFile, serverTokenFile}
}

// FixedTokens returns the secrets that the servers of the cluster share in dir, the
// server's directory: with which agents may join, and with which servers may. One that
// no administrator has fixed is empty.
func FixedTokens(dir string) (agents, servers token.Secret, err error) {
	if agents, err = fixedToken(filepath.Join(dir, tokenFile)); err == nil {
		servers, err = fixedToken(filepath.Join(dir, serverTokenFile))
	}
	return agents, servers, err
}

func fixedToken(path string) (token.Secret, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	t, err := token.Parse(strings.TrimSpace(string(data)))
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return t.Secret, nil
}

func (id *Identity) writeKubeconfig(cfg Config) error {
	cert, err := os.ReadFile(id.Admin.CertFile)
	if err != nil {
		return err
	}
	key, err := os.ReadFile(id.Admin.KeyFile)
	if err != nil {
		return err
	}
	c := clientcmdapi.NewConfig()
	c.Clusters["default"] = &clientcmdapi.Cluster{Server: id.URL, CertificateAuthorityData: id.ServerCA.PEM()}
	c.AuthInfos["default"] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	c.Contexts["default"] = &clientcmdapi.Context{Cluster: "default", AuthInfo: "default"}
	c.CurrentContext = "default"
	data, err := clientcmd.Write(*c)
	if err != nil {
		return fmt.Errorf("encode the kubeconfig: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Kubeconfig), 0o755); err != nil {
		return fmt.Errorf("write the kubeconfig: %w", err)
	}
	if _, err := atomicfile.WriteIfChanged(cfg.Kubeconfig, data, fs.FileMode(cfg.KubeconfigMode)); err != nil {
		return fmt.Errorf("write the kubeconfig: %w", err)
	}
	return nil
}
