package joining

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/internal/pki"
	"kedge/internal/servers"
)

// Config is the configuration of a member.
type Config struct {
	Dir      string // for the key, the certificates and the cluster's settings
	Server   string // URL of a server
	Token    string // join token; may be empty if the machine has joined before
	NodeName string
	// Servers are further servers, known since the machine has joined.
	Servers *servers.List
}

// Validate returns all mistakes in the configuration, joined.
func (c Config) Validate() error {
	var errs []error
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("agent directory %q is not an absolute path", c.Dir))
	}
	return errors.Join(append(errs, c.client().Validate())...)
}

// client is the client by which the machine joins.
func (c Config) client() Client {
	return Client{Role: Agent, Server: c.Server, Token: c.Token, NodeName: c.NodeName, KeyFile: filepath.Join(c.Dir, keyFile)}
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
	soon lifecycle.Wakeup

	renewing sync.Mutex // held while certificates are requested and stored

	mu     sync.Mutex // guards the fields below
	state  State
	signed time.Time // when this process received the certificates; zero before that, and after the machine has moved
	end    time.Time // earliest expiry of the certificates
	err    error     // of the last renewal
}

// Files of a member, below its directory, besides its state.
const (
	keyFile     = "node.key"
	clientFile  = "node.crt"
	networkFile = "network.crt"
	servingFile = "kubelet.crt"
	serverCA    = "server-ca.crt"
	clientCA    = "client-ca.crt"
)

// ClientFiles returns the paths of an agent's certificate as a client, of its key, and of the API's authority, in the agent's
// directory.
func ClientFiles(dir string) (cert, key, ca string) {
	return filepath.Join(dir, clientFile), filepath.Join(dir, keyFile), filepath.Join(dir, serverCA)
}

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

// ClientCAFile is the path of the authority of the kubelet's clients.
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

// Prepare makes this machine a member: it makes the key, joins with the token if it
// has not joined before, and otherwise renews its certificates, which needs no token.
// It waits for a server that cannot be reached, unless the machine has joined before: then it
// goes on with the files that it has. It is idempotent, and can be repeated after a crash at
// any point.
func Prepare(ctx context.Context, cfg Config, log *slog.Logger) (*Member, error) {
	if err := atomicfile.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("prepare the agent's directory: %w", err)
	}
	m, joined, err := open(cfg, log)
	switch {
	case err != nil:
		return nil, err
	case !joined: // certificates do not count without it
		return m, m.join(ctx)
	}
	err = m.renew(ctx)
	var refused *Refused
	switch {
	case err == nil:
		return m, nil
	case errors.As(err, &refused):
		return nil, m.refused(err)
	case m.end.IsZero():
		return nil, markRefusal(fmt.Errorf("renew this node's certificates, of which one cannot be read: %w", err))
	}
	log.Warn("no server answers; going on with the last known settings of the cluster", "err", err)
	return m, nil
}

// refused is the error of a renewal that a server has refused.
func (m *Member) refused(err error) error {
	return markRefusal(fmt.Errorf("renew this node's certificates with the key %s: %w", m.KeyFile(), err))
}

// open reads the files of a machine, if it has joined before.
func open(cfg Config, log *slog.Logger) (m *Member, joined bool, err error) {
	m = &Member{cfg: cfg, log: log, now: time.Now, soon: lifecycle.NewWakeup()}
	if m.state, joined, err = ReadState(Agent, cfg.Dir); err != nil || !joined {
		return m, false, err
	}
	if m.key, err = pki.LoadKey(m.KeyFile()); err != nil {
		return nil, true, m.damaged(err, fmt.Sprintf("run \"kedge node allow %s\" on a server, remove %s and %s, and join with a token", cfg.NodeName, m.KeyFile(), StateFile(Agent, cfg.Dir)))
	}
	if m.ca, err = readAuthority(m.ServerCAFile()); err != nil {
		return nil, true, m.damaged(err, fmt.Sprintf("remove %s and join with a token", StateFile(Agent, cfg.Dir)))
	}
	if err := cfg.client().CheckCluster(m.ca); err != nil {
		return nil, true, err
	}
	if m.end, err = m.earliestEnd(); err != nil {
		log.Warn("cannot read a certificate of this node; requesting a new one", "err", err)
	}
	return m, true, nil
}

// damaged is the error of a machine that has joined and lacks a file that it cannot make again. err is the error of the
// file, and remedy is for the case that there is no backup.
func (m *Member) damaged(err error, remedy string) error {
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w, and this machine has joined with it; restore it from a backup", err)
	}
	return errorkind.Permanent(fmt.Errorf("%w, or %s", err, remedy))
}

// readAuthority reads the self-signed certificate of an authority.
func readAuthority(path string) (*x509.Certificate, error) {
	c, err := readCert(path)
	if err != nil {
		return nil, err
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		return nil, fmt.Errorf("%w: %s: %w; restore it from a backup", pki.ErrDamaged, path, err)
	}
	return c, nil
}

func readCert(path string) (*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return pki.ParseCertificate(path, data)
}

// earliestEnd returns the earliest expiry of the certificates on disk.
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

// join makes the machine's key and joins.
func (m *Member) join(ctx context.Context) error {
	c, hint := m.cfg.client(), ""
	if _, err := os.Stat(c.KeyFile); err == nil { // an interrupted join, or a lost file
		hint = fmt.Sprintf(", or %s is missing, which you can restore from a backup", StateFile(Agent, m.cfg.Dir))
	}
	if _, err := c.ParseToken(hint); err != nil {
		return err
	}
	return c.Join(ctx, m.log, func(a Admission) error {
		m.key, m.ca = a.Key, a.CA
		return m.keep(a.Certificates, a.State)
	})
}

// renew requests new certificates from the servers, beginning with the configured server.
func (m *Member) renew(ctx context.Context) error {
	m.renewing.Lock()
	defer m.renewing.Unlock()
	old, err := ProveKey(m.key, m.cfg.NodeName, m.now())
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
			return m.keep(a, State{Server: server, Address: local, Cluster: a.Cluster})
		}
		errs = append(errs, fmt.Errorf("%s: %w", server, err))
	}
	return errors.Join(errs...)
}

// NodeUser is the name of a kubelet's user in the API.
func NodeUser(name string) string { return "system:node:" + name }

// keep stores a server's answer, the state last.
func (m *Member) keep(a Answer, s State) error {
	if err := errors.Join(m.check(a), s.check(Agent)); err != nil {
		return fmt.Errorf("cannot use the answer of %s: %w", s.Server, err)
	}
	for _, f := range []struct{ name, data string }{
		{serverCA, string(pki.PEM(m.ca))}, {clientCA, a.Clients},
		{servingFile, a.Serving}, {networkFile, a.Network}, {clientFile, a.Client},
	} {
		if _, err := atomicfile.WriteIfChanged(m.path(f.name), []byte(f.data), 0o644); err != nil {
			return err
		}
	}
	if err := s.Write(Agent, m.cfg.Dir); err != nil {
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
	_, err := pki.ParseCertificate("clientCA", []byte(a.Clients))
	return err
}
