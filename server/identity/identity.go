package identity

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
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
	"kedge/server/bootstrap"
)

// Identity has the credentials of a control plane, created at the first boot and kept from then on. It contains
// paths, not secrets.
type Identity struct {
	ServerCA *pki.Authority // signs the API's certificate
	// KubeletCA signs the kubelets' serving certificates. It differs from ServerCA, so that a node's
	// certificate is never valid for the API.
	KubeletCA *pki.Authority
	ClientCA  *pki.Authority // signs client certificates: administrators, nodes, the API server itself
	ProxyCA   *pki.Authority // signs the aggregator's proxy certificate
	PeerCA    *pki.Authority // signs the certificates for peer links between the servers' datastores only

	Serving        pki.Pair // the API's certificate
	KubeletClient  pki.Pair // the API server's client certificate for kubelets
	ProxyClient    pki.Pair // the aggregator's client certificate for extension API servers
	Admin          pki.Pair // cluster-admin, for the kubeconfig
	KubeletServing pki.Pair // the serving certificate of this machine's kubelet
	NodeClient     pki.Pair // client certificate of this machine's node, with the kubelet's key, for the other servers
	Peer           pki.Pair // certificate of this server's datastore for peer links

	ServiceAccountKey string // file of the keys of service accounts' tokens: the first signs
	EncryptionConfig  string // configures the key that encrypts Secrets at rest
	PodsCA            string // ca.crt in pods' service account volumes

	URL string // URL of the API, for the kubeconfig
}

// Names of files in the server's directory.
const (
	serviceAccountKey = "service-account.key" // in tls
	servingKubelet    = "serving-kubelet"
	encryptionConfig  = "encryption-config.yaml"
	tokenFile         = "token"
	serverTokenFile   = "server-token"
	peerCA            = "peer-ca"
	peerLeaf          = "peer"
)

// authorities are the names of the cluster's authorities; the API's authority is the first.
var authorities = []string{"server-ca", "kubelet-ca", "client-ca", "request-header-ca", peerCA}

// Prepare creates the missing credentials, renews certificates, and writes the administrator's kubeconfig. For
// an established server it creates no essential credential: a missing or replaced one is an error before
// anything is written. It is idempotent and crash-safe: files are written atomically, and essential credentials
// are never replaced.
func Prepare(cfg Config, now time.Time) (*Identity, error) {
	dir := cfg.tlsDir()
	if err := check(cfg, now); err != nil {
		return nil, err
	}
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
	if _, err := pki.EnsureSigningKeys(id.ServiceAccountKey); err != nil {
		return nil, err
	}
	if err := errors.Join(id.leaves(cfg, now), id.writePodsCA(cfg)); err != nil {
		return nil, err
	}
	if err := ensureEncryptionConfig(id.EncryptionConfig); err != nil {
		return nil, err
	}
	// Earlier versions wrote this file for kube-apiserver; it is not used any more.
	if err := os.Remove(filepath.Join(cfg.Dir, "authentication-config.yaml")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for name, secret := range map[string]joining.Secret{tokenFile: cfg.Token, serverTokenFile: cfg.ServerToken} {
		if err := ensureToken(filepath.Join(cfg.Dir, name), secret, id.ServerCA.Hash()); err != nil {
			return nil, err
		}
	}
	if err := id.writeKubeconfig(cfg); err != nil {
		return nil, err
	}
	return id, remember(cfg, now)
}

// leafSpec describes a certificate to be signed.
type leafSpec struct {
	ca   *pki.Authority
	name string
	leaf pki.Leaf
	into *pki.Pair
}

// leaves creates or renews the leaf certificates.
func (id *Identity) leaves(cfg Config, now time.Time) error {
	for _, l := range id.specs(cfg) {
		pair, err := l.ca.EnsureLeaf(cfg.tlsDir(), l.name, l.leaf, now)
		if err != nil {
			return err
		}
		*l.into = pair
	}
	return id.nodeClient(cfg, now)
}

// specs returns all certificates that have a key of their own.
func (id *Identity) specs(cfg Config) []leafSpec {
	return append(id.serving(cfg), []leafSpec{
		{id.ClientCA, kubeletClient, pki.Leaf{CommonName: bootstrap.KubeletClientUser, Client: true}, &id.KubeletClient},
		{id.ClientCA, adminClient, pki.Leaf{CommonName: "system:admin", Organizations: []string{"system:masters"}, Client: true}, &id.Admin},
		{id.PeerCA, peerLeaf, pki.Leaf{CommonName: cfg.NodeName, DNSNames: []string{datastore.PeerServerName}, Client: true, Server: true}, &id.Peer},
		{id.ProxyCA, proxyClient, pki.Leaf{CommonName: ProxyUser, Client: true}, &id.ProxyClient},
	}...)
}

// serving returns the certificates that contain this machine's addresses.
func (id *Identity) serving(cfg Config) []leafSpec {
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
	return []leafSpec{
		{id.ServerCA, servingAPI, pki.Leaf{CommonName: "kube-apiserver", DNSNames: names, IPs: ips, Server: true}, &id.Serving},
		{id.KubeletCA, servingKubelet, pki.Leaf{CommonName: joining.NodeUser(cfg.NodeName), Organizations: []string{"system:nodes"},
			DNSNames: []string{cfg.NodeName, "localhost"}, IPs: append([]net.IP{net.IPv4(127, 0, 0, 1), joining.NodeAddress(cfg.NodeName).AsSlice()}, nodeIPs...), Server: true}, &id.KubeletServing},
	}
}

// nodeClient signs the client certificate of this machine's node for the other servers, for the key that
// identifies the node. It is signed again at each start.
func (id *Identity) nodeClient(cfg Config, now time.Time) error {
	id.NodeClient = pki.Pair{CertFile: filepath.Join(cfg.tlsDir(), nodeClient+".crt"), KeyFile: id.KubeletServing.KeyFile, Renewed: true}
	if _, err := pki.EnsureKey(id.NodeClient.KeyFile); err != nil {
		return err
	}
	return id.ClientCA.Renew(id.NodeClient.CertFile, id.NodeClient.KeyFile, false, nodeLeaf(cfg), now)
}

func nodeLeaf(cfg Config) pki.Leaf {
	return pki.Leaf{CommonName: joining.NodeUser(cfg.NodeName), Organizations: []string{"system:nodes"}, Client: true}
}

// ProxyUser is the user as which the aggregator calls extension API servers.
const ProxyUser = "system:auth-proxy"

// ensureEncryptionConfig creates the key for secrets at rest at the first boot. It never replaces an existing
// file, because only its key decrypts the stored Secrets. "identity" is last so that data written before
// encryption stays readable; it is never used for writing.
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

// ensureToken writes the token with the secret that an administrator has configured, in the form that includes
// the hash of the cluster's authority. Without a secret it removes the file.
func ensureToken(path string, given joining.Secret, caHash string) error {
	if given == "" {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the token of an earlier start: %w", err)
		}
		return nil
	}
	t := joining.Token{CAHash: caHash, ID: joining.PresharedID, Secret: given}
	_, err := atomicfile.WriteIfChanged(path, []byte(t.Reveal()+"\n"), 0o600)
	return err
}

// PeerConfig returns the configuration of the peer links of the server in dir: the port, and the certificates
// that [Prepare] signs.
func PeerConfig(dir string, port uint16, addresses []netip.Addr) datastore.PeerConfig {
	tls := tlsDir(dir)
	return datastore.PeerConfig{
		Port: port, CAFile: filepath.Join(tls, peerCA+".crt"),
		CertFile: filepath.Join(tls, peerLeaf+".crt"), KeyFile: filepath.Join(tls, peerLeaf+".key"), Addresses: addresses,
	}
}

// Exists reports whether dir belongs to a server that has its cluster's credentials.
func Exists(dir string) bool {
	_, err := os.Stat(AuthorityFile(dir))
	return err == nil
}

// AuthorityFile is the path of the API authority's certificate of the server in dir. It identifies the cluster.
func AuthorityFile(dir string) string { return filepath.Join(tlsDir(dir), authorities[0]+".crt") }

// NodeKeyFile is the path of the key that identifies the node of the server in dir. It is the first file that a
// joining server creates.
func NodeKeyFile(dir string) string { return filepath.Join(tlsDir(dir), servingKubelet+".key") }

// SharedFiles returns the files that are equal on all servers of a cluster, relative to the server's directory.
// The optional files exist only if an administrator has configured secrets.
func SharedFiles() (files, optional []string) {
	for _, ca := range authorities {
		files = append(files, filepath.Join("tls", ca+".crt"), filepath.Join("tls", ca+".key"))
	}
	return append(files, accountKeysName, encryptionConfig), []string{tokenFile, serverTokenFile}
}

// EncryptionConfigFile is the path of the configuration of the keys of Secrets in dir, the server's directory.
func EncryptionConfigFile(dir string) string { return filepath.Join(dir, encryptionConfig) }

// accountKeysName is the path of the keys of service accounts' tokens in the server's directory.
var accountKeysName = filepath.Join("tls", serviceAccountKey)

// AccountKeysFile is the path of the keys of service accounts' tokens in dir, the server's directory.
func AccountKeysFile(dir string) string { return filepath.Join(dir, accountKeysName) }

// FixedTokens returns the configured secrets in dir, the server's directory, with which agents and servers may
// join. A secret that is not configured is empty.
func FixedTokens(dir string) (agents, servers joining.Secret, err error) {
	if agents, err = fixedToken(filepath.Join(dir, tokenFile)); err == nil {
		servers, err = fixedToken(filepath.Join(dir, serverTokenFile))
	}
	return agents, servers, err
}

func fixedToken(path string) (joining.Secret, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	t, err := joining.ParseToken(strings.TrimSpace(string(data)))
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return t.Secret, nil
}

// Unnamed returns why the API's certificate of this server is not valid for the host in a URL, and an empty text if it is.
func (id *Identity) Unnamed(server string) (string, error) {
	u, err := url.Parse(server)
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(id.Serving.CertFile)
	if err != nil {
		return "", err
	}
	c, err := pki.ParseCertificate(id.Serving.CertFile, data)
	if err != nil {
		return "", err
	}
	if err := c.VerifyHostname(u.Hostname()); err != nil {
		return err.Error(), nil
	}
	return "", nil
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
	name := cfg.KubeconfigName
	c.Clusters[name] = &clientcmdapi.Cluster{Server: id.URL, CertificateAuthorityData: id.ServerCA.PEM()}
	c.AuthInfos[name] = &clientcmdapi.AuthInfo{ClientCertificateData: cert, ClientKeyData: key}
	c.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name}
	c.CurrentContext = name
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
