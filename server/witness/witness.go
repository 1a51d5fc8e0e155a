package witness

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"kedge/datastore"
	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/pki"
)

// Files of a witness, below its directory, besides its state and its datastore.
const (
	keyFile    = "node.key"
	certFile   = "peer.crt"
	peerCAFile = "peer-ca.crt"
	caFile     = "server-ca.crt"
	storeDir   = "store"
)

// Config is the configuration of a witness.
type Config struct {
	Dir      string // for the key, the certificates and the datastore
	Server   string // URL of a server
	Token    string // join token; may be empty if the machine has joined before
	NodeName string
	Peers    []netip.AddrPort // addresses of this machine's datastore for the servers, best first
	// Forget is called before a removed witness joins anew: until it has joined it has no datastore.
	Forget func() error
}

// Validate returns all mistakes in the configuration, joined. A machine that has joined before needs no server.
func (c Config) Validate() error {
	if c.Server == "" && Joined(c.Dir) {
		return nil
	}
	return c.client().Validate()
}

func (c Config) client() joining.Client {
	return joining.Client{
		Role: joining.Witness, Server: c.Server, Token: c.Token, NodeName: c.NodeName, KeyFile: filepath.Join(c.Dir, keyFile), Peers: c.Peers,
	}
}

// Joined reports whether dir belongs to a witness that has joined a cluster. A damaged file counts as one.
func Joined(dir string) bool {
	_, err := os.Stat(joining.StateFile(joining.Witness, dir))
	return !errors.Is(err, fs.ErrNotExist)
}

// StoreDir is the directory of the datastore of the witness in dir.
func StoreDir(dir string) string { return filepath.Join(dir, storeDir) }

// PeerConfig returns the configuration of the datastore's links to the servers.
func PeerConfig(dir string, port uint16, addresses []netip.Addr) datastore.PeerConfig {
	return datastore.PeerConfig{
		Port: port, Addresses: addresses, CAFile: filepath.Join(dir, peerCAFile), CertFile: filepath.Join(dir, certFile), KeyFile: filepath.Join(dir, keyFile),
	}
}

// Witness is a machine that has joined a cluster as a witness. It is also the component that renews its certificate.
type Witness struct {
	cfg Config
	log *slog.Logger
	key *ecdsa.PrivateKey
	ca  *x509.Certificate // the API's authority

	mu      sync.Mutex // guards the fields below
	state   joining.State
	servers func() []netip.Addr // see SetServers; may be nil
}

// SetServers sets the function that returns the addresses of the servers as the datastore knows them now. A server that has
// joined or moved since the last renewal is asked there, at the port of the API of the server that answered last.
func (w *Witness) SetServers(addresses func() []netip.Addr) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.servers = addresses
}

// Prepare makes this machine a witness: it joins with the token if it has not joined before, or if it was removed and there is
// a token. The datastore of a removed witness is kept aside. It waits for a server that cannot be reached. It is idempotent,
// and can be repeated after a crash at any point.
func Prepare(ctx context.Context, cfg Config, log *slog.Logger) (*Witness, error) {
	if err := atomicfile.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("prepare the directory of the witness: %w", err)
	}
	w := &Witness{cfg: cfg, log: log}
	joined, err := w.open()
	if err != nil {
		return nil, err
	}
	if !joined {
		return w, w.join(ctx)
	}
	removed, err := datastore.Removed(StoreDir(cfg.Dir))
	switch {
	case err != nil:
		return nil, err
	case removed && cfg.Token != "":
		if _, err := cfg.client().ParseToken(""); err != nil {
			return nil, err
		}
		// Without its state the machine joins, also if it is switched off at any point of what follows.
		if err := errors.Join(cfg.Forget(), os.Remove(joining.StateFile(joining.Witness, cfg.Dir))); err != nil {
			return nil, err
		}
		return w, w.join(ctx)
	}
	if err := w.checkPeer(); err != nil {
		log.Warn("the certificate of this witness cannot be used; requesting a new one", "err", err)
		if renewal := w.Renew(ctx); renewal != nil {
			return nil, fmt.Errorf("%w, and no server has made a new one: %w", err, renewal)
		}
	}
	return w, nil
}

// open reads the files of a witness, if the machine has joined.
func (w *Witness) open() (joined bool, err error) {
	dir := w.cfg.Dir
	if w.state, joined, err = joining.ReadState(joining.Witness, dir); err != nil || !joined {
		return false, err
	}
	const remedy = "%w; restore it from a backup, or remove this witness with \"kedge server remove\" on a server and join again in an empty data directory"
	if w.key, err = pki.LoadKey(filepath.Join(dir, keyFile)); err != nil {
		return false, errorkind.Permanent(fmt.Errorf(remedy, err))
	}
	if w.ca, err = authority(filepath.Join(dir, caFile)); err != nil {
		return false, errorkind.Permanent(fmt.Errorf(remedy, err))
	}
	return true, w.cfg.client().CheckCluster(w.ca)
}

// authority reads the self-signed certificate of an authority.
func authority(path string) (*x509.Certificate, error) {
	c, err := readCertificate(path)
	if err != nil {
		return nil, err
	}
	if err := c.CheckSignatureFrom(c); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", pki.ErrDamaged, path, err)
	}
	return c, nil
}

func readCertificate(path string) (*x509.Certificate, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return pki.ParseCertificate(path, data)
}

// checkPeer returns an error if the certificate of the datastore is not for this machine's key, or its authority has not
// signed it. One that has expired is renewed later, see [Witness.Run].
func (w *Witness) checkPeer() error {
	path := filepath.Join(w.cfg.Dir, certFile)
	c, err := readCertificate(path)
	if err != nil {
		return err
	}
	ca, err := readCertificate(filepath.Join(w.cfg.Dir, peerCAFile))
	if err != nil {
		return err
	}
	if err := ca.CheckSignature(c.SignatureAlgorithm, c.RawTBSCertificate, c.Signature); err != nil {
		return fmt.Errorf("%s is not of the authority beside it: %w", path, err)
	}
	if pub, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&w.key.PublicKey) {
		return fmt.Errorf("%s is not for this machine's key", path)
	}
	return nil
}

// join asks a server to admit this machine, and keeps the answer.
func (w *Witness) join(ctx context.Context) error {
	c := w.cfg.client()
	if _, err := c.ParseToken(""); err != nil {
		return err
	}
	kept, err := datastore.SetAside(StoreDir(w.cfg.Dir), time.Now())
	if err != nil {
		return fmt.Errorf("keep the datastore of this removed witness: %w", err)
	}
	if kept != "" {
		w.log.Warn("this witness was removed from the cluster and joins it anew; its old datastore is kept", "path", kept)
	}
	return c.Join(ctx, w.log, func(a joining.Admission) error {
		w.key, w.ca = a.Key, a.CA
		if err := w.keep(a.Witness, a.State); err != nil {
			return fmt.Errorf("keep the answer of %s: %w", w.cfg.Server, err)
		}
		return nil
	})
}

// keep stores an answer of a server, the state last.
func (w *Witness) keep(a joining.WitnessAnswer, s joining.State) error {
	cert, err := pki.ParseCertificate("the certificate of the witness", []byte(a.Certificate))
	if err != nil {
		return err
	}
	if pub, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&w.key.PublicKey) {
		return errors.New("the certificate is not for this machine's key")
	}
	if _, err := pki.ParseCertificate("the authority of the datastores", []byte(a.Peers)); err != nil {
		return err
	}
	for name, data := range map[string]string{caFile: string(pki.PEM(w.ca)), peerCAFile: a.Peers, certFile: a.Certificate} {
		if _, err := atomicfile.WriteIfChanged(filepath.Join(w.cfg.Dir, name), []byte(data), 0o644); err != nil {
			return err
		}
	}
	if err := s.Write(joining.Witness, w.cfg.Dir); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.state = s
	return nil
}

// Cluster returns the cluster's settings as a server last told them.
func (w *Witness) Cluster() joining.Cluster { return w.current().Cluster }

// Admission returns the admission of the datastore's member.
func (w *Witness) Admission() (*datastore.Admission, error) {
	var a *datastore.Admission
	if err := json.Unmarshal(w.current().Admission, &a); err != nil {
		return nil, errorkind.Permanent(fmt.Errorf("read %s: the admission to the datastore: %w; restore the file from a backup", joining.StateFile(joining.Witness, w.cfg.Dir), err))
	}
	return a, nil
}

func (w *Witness) current() joining.State {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.state
}

const (
	// renewInterval is the maximum interval between renewals, of which each is random between half of it and all of it. The
	// certificate is valid for a year; a renewal also tells the witness the addresses of the servers.
	renewInterval = 24 * time.Hour
	// firstRetry and lastRetry bound the interval of retries while no server answers.
	firstRetry, lastRetry = 10 * time.Second, time.Hour
)

// Name implements lifecycle.Component.
func (w *Witness) Name() string { return "certificates" }

// Run implements lifecycle.Component. It calls ready at once: the datastore reads the certificate for each connection, so
// that even one that has expired is renewed while the datastore runs.
func (w *Witness) Run(ctx context.Context, ready func()) error {
	ready()
	retry := firstRetry
	for {
		wait := renewInterval/2 + rand.N(renewInterval/2)
		if err := w.Renew(ctx); err == nil {
			retry = firstRetry
		} else if ctx.Err() == nil {
			w.log.Warn("no server has renewed the certificate of this witness, and the old one stays; trying again", "err", err, "again", retry)
			wait, retry = retry, min(2*retry, lastRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// Renew requests a new certificate from the servers, beginning with the configured one.
func (w *Witness) Renew(ctx context.Context) error {
	proof, err := joining.ProveKey(w.key, w.cfg.NodeName, time.Now())
	if err != nil {
		return err
	}
	state := w.current()
	all := slices.Concat([]string{w.cfg.Server, state.Server}, state.Cluster.Servers, w.urls(state))
	var errs []error
	for i, server := range all {
		if server == "" || slices.Contains(all[:i], server) {
			continue
		}
		a, err := joining.RenewWitness(ctx, server, w.ca, proof)
		if err == nil {
			state.Server, state.Cluster = server, a.Cluster
			return w.keep(a, state)
		}
		errs = append(errs, fmt.Errorf("%s: %w", server, err))
	}
	return errors.Join(errs...)
}

// urls returns the URLs of the servers as the datastore knows them.
func (w *Witness) urls(state joining.State) (all []string) {
	w.mu.Lock()
	addresses := w.servers
	w.mu.Unlock()
	u, err := url.Parse(state.Server)
	if addresses == nil || err != nil {
		return nil
	}
	for _, a := range addresses() {
		all = append(all, "https://"+net.JoinHostPort(a.String(), cmp.Or(u.Port(), "443")))
	}
	return all
}

// Certificates examines the certificates of the witness in dir.
func Certificates(dir string, now time.Time) (all []pki.Examined) {
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, f := range []pki.File{
		{Name: "server-ca", CertFile: in(caFile), UsedBy: "has signed the API's certificate"},
		{Name: "peer-ca", CertFile: in(peerCAFile), UsedBy: "has signed for the datastores"},
		{Name: "peer", CertFile: in(certFile), KeyFile: in(keyFile), AuthorityFile: in(peerCAFile), UsedBy: "this machine's datastore, towards the servers"},
	} {
		all = append(all, f.Examine(now))
	}
	return all
}
