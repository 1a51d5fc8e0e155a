package joining

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/internal/atomicfile"
	"kedge/internal/pki"
	"kedge/internal/servers"
	"kedge/internal/token"
)

// What can be wrong with a machine that is to be a member of a cluster.
var (
	ErrNotJoined    = errors.New("this machine has not joined a cluster yet")
	ErrOtherCluster = errors.New("this machine is a member of another cluster")
)

// Config is what a machine is told about joining.
type Config struct {
	Dir      string // for the key, the certificates and the cluster's settings
	Server   string // URL of a server
	Token    string // the text of one; empty where the machine has joined before
	NodeName string
	// Servers are further ones, that were heard of since the machine has joined.
	Servers *servers.List
}

// Validate reports everything that is wrong with c, joined.
func (c Config) Validate() error {
	var errs []error
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("agent directory %q is not an absolute path", c.Dir))
	}
	switch u, err := url.Parse(c.Server); {
	case c.Server == "":
		errs = append(errs, errors.New("no server to join; name one with --server https://HOST:6443"))
	case err != nil || u.Scheme != "https" || u.Hostname() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil:
		errs = append(errs, fmt.Errorf("--server %q is not like https://HOST:6443", c.Server))
	}
	if c.Token != "" {
		if _, err := token.Parse(c.Token); err != nil {
			errs = append(errs, fmt.Errorf("--token: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Member is a machine of a cluster: its key, its certificates on disk, and the
// cluster's settings as of the last answer of a server. It is also the component
// that renews the certificates.
type Member struct {
	cfg Config
	log *slog.Logger
	key *ecdsa.PrivateKey
	ca  *x509.Certificate // the API's authority
	now func() time.Time
	// soon asks for a renewal; it holds one request.
	soon chan struct{}

	mu     sync.Mutex // guards what follows
	state  state
	signed time.Time // when the certificates came; zero: by an earlier process
	end    time.Time // when the first of them expires
	err    error     // of the last renewal
}

// state is what is kept in cluster.json.
type state struct {
	Server  string     `json:"server"`  // that answered last
	Address netip.Addr `json:"address"` // the machine's own towards it
	Cluster Cluster    `json:"cluster"`
}

// Files of a member, below its directory.
const (
	keyFile     = "node.key"
	clientFile  = "node.crt"
	networkFile = "network.crt"
	servingFile = "kubelet.crt"
	serverCA    = "server-ca.crt"
	clientCA    = "client-ca.crt"
	stateFile   = "cluster.json"
)

func (m *Member) path(name string) string { return filepath.Join(m.cfg.Dir, name) }

// KeyFile is the path of the machine's private key.
func (m *Member) KeyFile() string { return m.path(keyFile) }

// ClientCertFile is the path of the kubelet's certificate as a client.
func (m *Member) ClientCertFile() string { return m.path(clientFile) }

// NetworkCertFile is the path of the data path's certificate as a client.
func (m *Member) NetworkCertFile() string { return m.path(networkFile) }

// ServingCertFile is the path of the kubelet's certificate as a server.
func (m *Member) ServingCertFile() string { return m.path(servingFile) }

// ServerCAFile is the path of the API's authority.
func (m *Member) ServerCAFile() string { return m.path(serverCA) }

// ServerCA is the certificate of the API's authority, as DER.
func (m *Member) ServerCA() []byte { return m.ca.Raw }

// ClientCAFile is the path of the authority of those who may call the kubelet.
func (m *Member) ClientCAFile() string { return m.path(clientCA) }

// Cluster is the cluster's settings as a server last told them.
func (m *Member) Cluster() Cluster {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Cluster
}

// Server is the URL of the server that answered last.
func (m *Member) Server() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Server
}

// Address is this machine's own address towards that server.
func (m *Member) Address() netip.Addr {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state.Address
}

// Known returns the cluster's settings that are kept in dir, and false where no
// machine has joined with it.
func Known(dir string) (c Cluster, address netip.Addr, ok bool, err error) {
	s, err := readState(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return Cluster{}, netip.Addr{}, false, nil
	}
	return s.Cluster, s.Address, err == nil, err
}

func readState(dir string) (s state, err error) {
	path := filepath.Join(dir, stateFile)
	data, err := os.ReadFile(path)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("read %s: %w; remove it and start kedge with a token", path, err)
	}
	return s, nil
}

// Prepare makes this machine a member: it makes the key, joins with the token if it
// has not joined before, and otherwise renews its certificates, which needs none.
// A server that cannot be reached is waited for, unless the machine has joined
// before: it then goes on with what it has. It is idempotent, and safe to run again
// after a crash at any point.
func Prepare(ctx context.Context, cfg Config, log *slog.Logger) (*Member, error) {
	if err := atomicfile.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("prepare the agent's directory: %w", err)
	}
	m := &Member{cfg: cfg, log: log, now: time.Now, soon: make(chan struct{}, 1)}
	var err error
	if m.key, err = pki.EnsureKey(m.KeyFile()); err != nil {
		return nil, err
	}
	switch m.state, err = readState(cfg.Dir); {
	case errors.Is(err, fs.ErrNotExist): // it is written last: there may be certificates, which count for nothing
		return m, m.joinUntilDone(ctx)
	case err != nil:
		return nil, err
	}
	if m.ca, err = readCert(m.ServerCAFile()); err != nil {
		return nil, fmt.Errorf("%w; restore it, or remove %s and join with a token", err, m.path(stateFile))
	}
	if t, err := token.Parse(cfg.Token); err == nil && t.CAHash != "" && t.CAHash != pki.Hash(m.ca) {
		return nil, fmt.Errorf("%w: its authority is %s, and the token is for %s; leave --token out, or choose another --data-dir", ErrOtherCluster, pki.Hash(m.ca), t.CAHash)
	}
	if m.end, err = m.earliestEnd(); err != nil {
		log.Warn("a certificate of this node cannot be read; a server signs another", "err", err)
	}
	err = m.renew(ctx)
	var refused *Refused
	switch {
	case err == nil:
		return m, nil
	case errors.As(err, &refused):
		return nil, fmt.Errorf("renew this node's certificates: %w", err)
	case m.end.IsZero():
		return nil, fmt.Errorf("renew this node's certificates, of which one cannot be read: %w", err)
	}
	log.Warn("no server answers; going on with what is known of the cluster", "err", err)
	return m, nil
}

func readCert(path string) (*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return pki.ParseCertificate(path, data)
}

// earliestEnd is when the first of the certificates on disk expires.
func (m *Member) earliestEnd() (end time.Time, err error) {
	for _, name := range []string{clientFile, networkFile, servingFile} {
		c, err := readCert(m.path(name))
		if err != nil {
			return time.Time{}, err
		}
		if end.IsZero() || c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end, nil
}

// joinUntilDone joins, and tries again while no server can be reached.
func (m *Member) joinUntilDone(ctx context.Context) error {
	if m.cfg.Token == "" {
		return fmt.Errorf("%w: make a token with \"kedge token create\" on a server, and give it with --token", ErrNotJoined)
	}
	t, err := token.Parse(m.cfg.Token)
	if err != nil {
		return fmt.Errorf("--token: %w", err)
	}
	for wait := firstRetry; ; wait = min(2*wait, lastJoinRetry) {
		err := m.join(ctx, t)
		var refused *Refused
		if err == nil || errors.As(err, &refused) || errors.Is(err, ErrWrongCA) || ctx.Err() != nil {
			return err
		}
		m.log.Warn("the cluster cannot be joined yet", "err", err, "again", wait)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(jitter(wait)):
		}
	}
}

const (
	firstRetry    = 500 * time.Millisecond
	lastJoinRetry = 10 * time.Second
	lastRetry     = 5 * time.Minute // of a renewal
)

func (m *Member) join(ctx context.Context, t token.Token) error {
	ca, err := FetchCA(ctx, m.cfg.Server, t)
	if err != nil {
		return err
	}
	csr, err := pki.Request(m.key)
	if err != nil {
		return err
	}
	a, local, err := Join(ctx, m.cfg.Server, ca, Request{TokenID: t.ID, Secret: string(t.Secret), NodeName: m.cfg.NodeName, CSR: string(csr)})
	if err != nil {
		return fmt.Errorf("join the cluster: %w", err)
	}
	m.ca = ca
	return m.take(a, m.cfg.Server, local)
}

// renew asks the servers for new certificates, the one that was named first.
func (m *Member) renew(ctx context.Context) error {
	old, err := m.proof()
	if err != nil {
		return err
	}
	m.mu.Lock()
	all := slices.Concat([]string{m.cfg.Server, m.state.Server}, m.state.Cluster.Servers)
	m.mu.Unlock()
	if m.cfg.Servers != nil {
		all = append(all, m.cfg.Servers.All()...)
	}
	var errs []error
	for i, server := range all {
		if server == "" || slices.Contains(all[:i], server) {
			continue
		}
		a, local, err := Renew(ctx, server, m.ca, old)
		if err == nil {
			return m.take(a, server, local)
		}
		errs = append(errs, fmt.Errorf("%s: %w", server, err))
	}
	return errors.Join(errs...)
}

// proof is a certificate for the machine's key and name, signed by the key itself:
// the server knows the key, and what anybody has signed adds nothing to that. So
// certificates that have expired or are lost need no token.
func (m *Member) proof() (tls.Certificate, error) {
	now := m.now()
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: NodeUser(m.cfg.NodeName)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &m.key.PublicKey, m.key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("prove the node's key: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: m.key}, nil
}

// NodeUser is the API's user that a node's kubelet is.
func NodeUser(name string) string { return "system:node:" + name }

// take writes what a server has answered: the settings last, since they are what
// says that the machine has joined.
func (m *Member) take(a Answer, server string, local netip.Addr) error {
	if err := m.check(a); err != nil {
		return fmt.Errorf("the answer of %s cannot be used: %w", server, err)
	}
	for _, f := range []struct{ name, data string }{
		{serverCA, string(pki.PEM(m.ca))}, {clientCA, a.Clients},
		{servingFile, a.Serving}, {networkFile, a.Network}, {clientFile, a.Client},
	} {
		if _, err := atomicfile.WriteIfChanged(m.path(f.name), []byte(f.data), 0o644); err != nil {
			return err
		}
	}
	s := state{Server: server, Address: local, Cluster: a.Cluster}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if _, err := atomicfile.WriteIfChanged(m.path(stateFile), append(data, '\n'), 0o644); err != nil {
		return err
	}
	end, err := m.earliestEnd()
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state, m.signed, m.end, m.err = s, m.now(), end, nil
	return nil
}

// check makes sure that the certificates are for this machine's key.
func (m *Member) check(a Answer) error {
	for name, data := range map[string]string{"client": a.Client, "network": a.Network, "serving": a.Serving} {
		c, err := pki.ParseCertificate(name, []byte(data))
		if err != nil {
			return err
		}
		if pub, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&m.key.PublicKey) {
			return fmt.Errorf("the %s certificate is not for this node's key", name)
		}
	}
	if _, err := pki.ParseCertificate("clientCA", []byte(a.Clients)); err != nil {
		return err
	}
	if len(a.Cluster.ClusterCIDRs) == 0 || len(a.Cluster.ServiceCIDRs) == 0 || a.Cluster.ClusterDomain == "" {
		return errors.New("the cluster's settings are not whole")
	}
	return nil
}
