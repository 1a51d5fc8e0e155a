package join

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"kedge/internal/joining"
	"kedge/internal/pki"
)

// Life is how long the certificates of an agent are valid. What a thief has stolen
// is worth no longer; a node that was off for longer proves its key and gets new ones.
const Life = 30 * 24 * time.Hour

// Config is everything the service is told.
type Config struct {
	ServerCA  *pki.Authority // of the API's certificate: shown to everybody
	ClientCA  *pki.Authority // signs what nodes call the API with
	KubeletCA *pki.Authority // signs what kubelets serve with
	PeerCA    *pki.Authority // signs what a witness's datastore shows the others
	PeerName  string         // the name in the certificates of all datastores

	// Preshared are an administrator's own secrets, one for each role at most.
	Preshared map[joining.Role]joining.Secret
	Cluster   joining.Cluster // what nodes are told
	// NetworkGroup is the group of the users as which the nodes' data paths read the API.
	NetworkGroup string
	// OwnAddresses are this server's, which no other node's certificate may name; nil for
	// none.
	OwnAddresses func() []netip.Addr
	// Servers admits servers.
	Servers Servers
	// External says that the servers use an external datastore.
	External bool
	Life     time.Duration // of what is signed; see [Life]
}

// Servers is what the service needs of the control plane to admit another server.
type Servers interface {
	// URLs are those of the API, of all servers that are known, this one's first.
	URLs() []string
	// Credentials are what the new server gets, sealed to its key.
	Credentials() (joining.Credentials, error)
	// Admit makes room in the store for a member of the name, reached at peers, and
	// returns what it needs to start.
	Admit(ctx context.Context, name string, peers []netip.AddrPort) (json.RawMessage, error)
	// AdmitWitness is Admit for a witness.
	AdmitWitness(ctx context.Context, name string, peers []netip.AddrPort) (json.RawMessage, error)
}

// Service answers machines that join and nodes that renew their certificates.
type Service struct {
	cfg    Config
	tokens *Tokens
	nodes  *Nodes
	limit  *limiter
	slots  chan struct{}   // bounds the requests that are worked on
	proofs func() []string // made once, when they are first asked for
	log    *slog.Logger
	now    func() time.Time
}

const (
	maxAtOnce  = 16              // requests are worked on at a time
	bodyWithin = 5 * time.Second // the whole of a request has arrived
)

// New makes the service. client acts for the server itself.
func New(cfg Config, client kubernetes.Interface, log *slog.Logger) *Service {
	secrets := client.CoreV1().Secrets(metav1.NamespaceSystem)
	if cfg.OwnAddresses == nil {
		cfg.OwnAddresses = func() []netip.Addr { return nil }
	}
	s := &Service{
		cfg: cfg, log: log, now: time.Now,
		tokens: &Tokens{secrets: secrets, now: time.Now},
		nodes:  &Nodes{secrets: secrets, now: time.Now},
		limit:  &limiter{now: time.Now, sources: map[netip.Prefix]allowance{}},
		slots:  make(chan struct{}, maxAtOnce),
	}
	s.proofs = sync.OnceValue(s.makeProofs)
	for role, secret := range cfg.Preshared {
		if secret != "" && !joining.LooksRandom(secret) {
			log.Warn("the fixed secret with which machines join does not look random: it can be guessed by trial; use \"openssl rand -hex 20\"", "role", role)
		}
	}
	return s
}

// Tokens are the cluster's tokens, for the administrator.
func (s *Service) Tokens() *Tokens { return s.tokens }

// Nodes are the keys of the nodes, for the administrator.
func (s *Service) Nodes() *Nodes { return s.nodes }

// CAHash names the cluster's authority in tokens.
func (s *Service) CAHash() string { return s.cfg.ServerCA.Hash() }

// Cluster is what nodes are told.
func (s *Service) Cluster() joining.Cluster {
	c := s.cfg.Cluster
	c.Servers = s.cfg.Servers.URLs()
	return c
}

// Handler answers the requests below [joining.Prefix] and passes all others on.
// It comes before authentication: each path has its own.
func (s *Service) Handler(next http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+joining.PathCA, s.answerCA)
	mux.HandleFunc("POST "+joining.PathJoin, answering(s, s.admitAgent))
	mux.HandleFunc("POST "+joining.PathRenew, answering(s, s.renew))
	mux.HandleFunc("POST "+joining.PathServer, answering(s, s.admitServer))
	mux.HandleFunc("POST "+joining.PathWitness, answering(s, s.admitWitness))
	mux.HandleFunc("POST "+joining.PathRenewWitness, answering(s, s.renewWitness))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, joining.Prefix) {
			next.ServeHTTP(w, r)
			return
		}
		source := sourceOf(r)
		if !s.limit.allow(source) {
			w.Header().Set("Retry-After", "10")
			tell(w, http.StatusTooManyRequests, errTooMany.Error())
			return
		}
		// The body first: a sender that dawdles must not take a slot from others.
		// Only a writer that is no connection has no deadline.
		if err := http.NewResponseController(w).SetReadDeadline(s.now().Add(bodyWithin)); err != nil && !errors.Is(err, http.ErrNotSupported) {
			tell(w, http.StatusInternalServerError, "the connection cannot be bounded")
			return
		}
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, joining.MaxBody))
		if err != nil {
			tell(w, http.StatusBadRequest, fmt.Sprintf("%v: %v", errRequest, err))
			return
		}
		// Over HTTP/1.1 the server goes on reading, to learn that the client has gone, and takes the deadline for that.
		if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil && !errors.Is(err, http.ErrNotSupported) {
			tell(w, http.StatusInternalServerError, "the connection cannot be given more time")
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		select {
		case s.slots <- struct{}{}:
			defer func() { <-s.slots }()
		case <-r.Context().Done():
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		mux.ServeHTTP(w, r)
	})
}

// sourceOf is the address that the connection came from; what a header says of it
// is the sender's claim.
func sourceOf(r *http.Request) netip.Addr {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Addr{}
	}
	return a.Unmap().WithZone("")
}

func (s *Service) answerCA(w http.ResponseWriter, _ *http.Request) {
	reply(w, http.StatusOK, joining.CA{Certificate: string(s.cfg.ServerCA.PEM()), Proofs: s.proofs()})
}

// makeProofs shows that this server knows the fixed secrets. Anybody can ask for the proofs
// and try guesses against them at home, so they are slow to compute; only for a secret that
// no guess will find there is the quick one too, which older agents ask for.
func (s *Service) makeProofs() []string {
	var out []string
	for _, role := range []joining.Role{joining.Agent, joining.Server} {
		secret := s.cfg.Preshared[role]
		if secret == "" {
			continue
		}
		out = append(out, joining.SlowProof(secret, s.cfg.ServerCA.Cert))
		if joining.LooksRandom(secret) {
			out = append(out, joining.Proof(secret, s.cfg.ServerCA.Cert))
		}
	}
	return out
}

// answering sends what f returns, or why it returned nothing.
func answering[Answer any](s *Service, f func(*http.Request) (Answer, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		answer, err := f(r)
		if err == nil {
			reply(w, http.StatusOK, answer)
			return
		}
		s.Refuse(w, r, err)
	}
}

// Refuse answers a request with why it is refused, and notes it. What is nobody's
// business but the server's is only noted.
func (s *Service) Refuse(w http.ResponseWriter, r *http.Request, err error) {
	status := statusOf(err)
	if status == http.StatusInternalServerError {
		s.log.Error("a machine was not answered", "path", r.URL.Path, "source", sourceOf(r), "err", err)
		err = errors.New("the server could not answer; its log says why")
	} else if status != http.StatusTooManyRequests { // they would fill the log
		s.log.Warn("a machine was refused", "path", r.URL.Path, "source", sourceOf(r), "err", err)
	}
	tell(w, status, err.Error())
}

// Why a request gets no answer, whatever it asks for.
var (
	errRequest     = errors.New("the request is not one of kedge")
	errCertificate = errors.New("the certificate of the connection is none that the cluster has signed for a node, or it has expired")
	errTooMany     = errors.New("too many requests from this address; wait some seconds")
)

// statusOf is the status of HTTP for why a machine was refused.
func statusOf(err error) int {
	for _, known := range []struct {
		status int
		errs   []error
	}{
		{http.StatusBadRequest, []error{errRequest, ErrBadName, pki.ErrRequest}},
		{http.StatusUnauthorized, []error{ErrUnknownToken, errCertificate}},
		{http.StatusForbidden, []error{ErrExpired, ErrUsedUp, ErrRole, ErrName, ErrUnknownNode}},
		{http.StatusConflict, []error{ErrNameTaken, errDatastore}},
		{http.StatusTooManyRequests, []error{errTooMany}},
		{http.StatusServiceUnavailable, []error{errAdmission}},
	} {
		if slices.ContainsFunc(known.errs, func(e error) bool { return errors.Is(err, e) }) {
			return known.status
		}
	}
	return http.StatusInternalServerError
}

func tell(w http.ResponseWriter, status int, text string) {
	reply(w, status, joining.Problem{Error: text})
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the client is gone, and will ask again
}

// admitAgent admits a machine as an agent.
func (s *Service) admitAgent(r *http.Request) (joining.Answer, error) {
	var q joining.Request
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		return joining.Answer{}, fmt.Errorf("%w: %w", errRequest, err)
	}
	key, err := s.admit(r, q, joining.Agent)
	if err != nil {
		return joining.Answer{}, err
	}
	return s.sign(q.NodeName, key, sourceOf(r))
}

// maxPeers bounds the addresses that a server may say it has.
const maxPeers = 16

// admitServer admits a machine as a server. The order matters: a machine that is not
// authorised changes nothing, and the credentials leave last.
func (s *Service) admitServer(r *http.Request) (joining.ServerAnswer, error) {
	var none joining.ServerAnswer
	_, key, admission, err := s.admitMember(r, joining.Server, s.cfg.Servers.Admit)
	if err != nil {
		return none, err
	}
	credentials, err := s.cfg.Servers.Credentials()
	if err != nil {
		return none, err
	}
	plain, err := json.Marshal(credentials)
	if err != nil {
		return none, err
	}
	sealed, err := pki.Seal(key, joining.SealPurpose, plain)
	if err != nil {
		return none, err
	}
	return joining.ServerAnswer{Cluster: s.Cluster(), Sealed: sealed, Admission: admission}, nil
}

// admitMember admits a machine with a member of the datastore, of which make is the admission there.
func (s *Service) admitMember(r *http.Request, role joining.Role, make func(context.Context, string, []netip.AddrPort) (json.RawMessage, error)) (
	name string, key *ecdsa.PublicKey, admission json.RawMessage, err error,
) {
	var q joining.ServerRequest
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		return "", nil, nil, fmt.Errorf("%w: %w", errRequest, err)
	}
	if len(q.Peers) == 0 || len(q.Peers) > maxPeers {
		return "", nil, nil, fmt.Errorf("%w: a %s has between 1 and %d addresses", errRequest, role, maxPeers)
	}
	if err := s.sameDatastore(q, role); err != nil {
		return "", nil, nil, err
	}
	if key, err = s.admit(r, q.Request, role); err != nil {
		return "", nil, nil, err
	}
	// The machine does not wait for longer, and would ask for another admission, for which this one is removed.
	ctx, cancel := context.WithTimeout(r.Context(), joining.AdmitWithin)
	defer cancel()
	if admission, err = make(ctx, q.NodeName, q.Peers); err != nil {
		return "", nil, nil, fmt.Errorf("%w: %w", errAdmission, err)
	}
	return q.NodeName, key, admission, nil
}

// admitWitness admits a machine as a witness. It gets the certificate of its datastore, and no secret of the cluster.
func (s *Service) admitWitness(r *http.Request) (joining.WitnessAnswer, error) {
	name, key, admission, err := s.admitMember(r, joining.Witness, s.cfg.Servers.AdmitWitness)
	if err != nil {
		return joining.WitnessAnswer{}, err
	}
	a, err := s.signWitness(name, key)
	a.Admission = admission
	return a, err
}

// renewWitness is [Service.renew] for a witness.
func (s *Service) renewWitness(r *http.Request) (joining.WitnessAnswer, error) {
	name, key, err := s.holder(r, joining.Witness)
	if err != nil {
		return joining.WitnessAnswer{}, err
	}
	return s.signWitness(name, key)
}

// signWitness makes the certificate of a witness's datastore.
func (s *Service) signWitness(name string, key *ecdsa.PublicKey) (joining.WitnessAnswer, error) {
	leaf := pki.Leaf{CommonName: name, Organizations: []string{joining.WitnessGroup}, DNSNames: []string{s.cfg.PeerName}, Client: true, Server: true}
	signed, err := s.cfg.PeerCA.Sign(key, leaf, pki.LeafLife, s.now())
	if err != nil {
		return joining.WitnessAnswer{}, fmt.Errorf("sign for witness %s: %w", name, err)
	}
	return joining.WitnessAnswer{Cluster: s.Cluster(), Certificate: string(signed), Peers: string(s.cfg.PeerCA.PEM())}, nil
}

// errDatastore is wrapped when a server has another datastore than the cluster.
var errDatastore = errors.New("the servers of a cluster have the same datastore")

// sameDatastore returns an error if a machine that is to be a server has another datastore than this one. It is told before its
// token is used.
func (s *Service) sameDatastore(q joining.ServerRequest, role joining.Role) error {
	switch {
	case s.cfg.External && role == joining.Witness:
		return fmt.Errorf("%w, which is an external etcd here, and has no witness", errDatastore)
	case q.External == s.cfg.External:
		return nil
	case s.cfg.External:
		return fmt.Errorf("%w, which is an external etcd here: start this one with --datastore-endpoint and the other settings of the etcd too", errDatastore)
	}
	return fmt.Errorf("%w, which is kedge's own here: leave --datastore-endpoint out", errDatastore)
}

// errAdmission is wrapped when the store has no room for a server at the moment.
var errAdmission = errors.New("the datastore takes no further server now")

// admit checks what a machine asks for and its token, gives the name to its key, and
// returns the key. A machine that has joined with this key before, and did not see the
// answer, needs no second use.
func (s *Service) admit(r *http.Request, q joining.Request, role joining.Role) (*ecdsa.PublicKey, error) {
	ctx := r.Context()
	if err := validName(q.NodeName); err != nil {
		return nil, err
	}
	key, err := pki.ParseRequest([]byte(q.CSR))
	if err != nil {
		return nil, err
	}
	fingerprint, err := pki.Fingerprint(key)
	if err != nil {
		return nil, err
	}
	secret := joining.Secret(q.Secret)
	preshared := q.TokenID == joining.PresharedID
	if preshared {
		if err := s.checkPreshared(secret, role); err != nil {
			return nil, err
		}
	} else if err := s.tokens.check(ctx, q.TokenID, secret, role, q.NodeName); err != nil {
		return nil, err
	}
	admitted, err := s.nodes.admitted(ctx, q.NodeName, fingerprint, role)
	if err != nil {
		return nil, err
	}
	if !admitted {
		// The use goes first: were the name given first, a machine that came too late
		// for the last use would be admitted all the same.
		if !preshared {
			if err := s.tokens.spend(ctx, q.TokenID, secret, role, q.NodeName); err != nil {
				return nil, err
			}
		}
		if err := s.nodes.admit(ctx, q.NodeName, fingerprint, role); err != nil {
			return nil, err
		}
	}
	s.log.Info("a machine joins", "node", q.NodeName, "role", role, "source", sourceOf(r), "token", q.TokenID, "key", fingerprint[:16])
	return key, nil
}

// checkPreshared returns nil if the secret is the one that was fixed for the role.
func (s *Service) checkPreshared(secret joining.Secret, role joining.Role) error {
	is := func(r joining.Role) bool {
		fixed := s.cfg.Preshared[r]
		return fixed != "" && secret.Matches(fixed.Hash())
	}
	switch {
	case is(role), role == joining.Witness && is(joining.Server):
		return nil
	case role != joining.Agent && is(joining.Agent):
		return fmt.Errorf("%w: the secret that is fixed with --token lets agents in only; make a token with \"kedge token create --role server\", or fix a secret for servers with --server-token", ErrRole)
	case role == joining.Agent && is(joining.Server):
		return fmt.Errorf("%w: the secret that is fixed with --server-token lets servers in only", ErrRole)
	}
	return ErrUnknownToken
}

// renew signs again for a node that proves its key by the connection itself. Who
// has signed the certificate that carries the key, and until when, does not matter.
func (s *Service) renew(r *http.Request) (joining.Answer, error) {
	name, key, err := s.holder(r, joining.Agent)
	if err != nil {
		return joining.Answer{}, err
	}
	return s.sign(name, key, sourceOf(r))
}

// holder is the machine with the role whose key the connection of a request proves.
func (s *Service) holder(r *http.Request, role joining.Role) (name string, key *ecdsa.PublicKey, err error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return "", nil, fmt.Errorf("%w: the connection has no certificate of a node", errRequest)
	}
	c := r.TLS.PeerCertificates[0]
	name, ok := strings.CutPrefix(c.Subject.CommonName, joining.NodeUser(""))
	key, isEC := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || !isEC {
		return "", nil, fmt.Errorf("%w: the certificate of the connection is not a node's", errRequest)
	}
	fingerprint, err := pki.Fingerprint(key)
	if err != nil {
		return "", nil, err
	}
	admitted, err := s.nodes.admitted(r.Context(), name, fingerprint, role)
	if err != nil {
		return "", nil, err
	}
	if !admitted {
		return "", nil, fmt.Errorf("%w with this key: %q; stop kedge here, remove its data directory, and join with a token", ErrUnknownNode, name)
	}
	return name, key, nil
}

// Identify returns the node that a request comes from, and its key's fingerprint, if
// the cluster has signed the certificate of the connection for it, that has not
// expired, and the key is the node's. Machines that fail in this share the allowance
// that those have who join, so that no source can keep the server busy by trying.
func (s *Service) Identify(r *http.Request) (node, key string, err error) {
	source := sourceOf(r)
	// Before the work, which is what is to be bounded. A node must not be locked out by others
	// behind the same router: its certificate is verified all the same, which costs less than
	// the connection has, and the API is asked for nobody else.
	allowed := s.limit.allow(source)
	if !allowed && s.verify(r) != nil {
		return "", "", errTooMany
	}
	node, key, err = s.identify(r)
	if err == nil && allowed {
		s.limit.giveBack(source)
	}
	return node, key, err
}

func (s *Service) identify(r *http.Request) (node, key string, err error) {
	if err := s.verify(r); errors.Is(err, errCertificate) {
		return "", "", err
	}
	node, public, err := s.holder(r, joining.Agent)
	if err != nil {
		return "", "", err
	}
	key, err = pki.Fingerprint(public)
	return node, key, err
}

// verify returns nil if the cluster has signed the certificate of a request's connection for
// a node, and it has not expired.
func (s *Service) verify(r *http.Request) error {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return errRequest
	}
	roots := x509.NewCertPool()
	roots.AddCert(s.cfg.ClientCA.Cert)
	c := r.TLS.PeerCertificates[0]
	_, err := c.Verify(x509.VerifyOptions{Roots: roots, CurrentTime: s.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil || !slices.Contains(c.Subject.Organization, nodesGroup) {
		return errCertificate
	}
	return nil
}

// sign makes a node's certificates. The address is the one that the node was seen
// with: what it says of itself counts for nothing.
func (s *Service) sign(name string, key *ecdsa.PublicKey, source netip.Addr) (joining.Answer, error) {
	serving := pki.Leaf{
		CommonName: joining.NodeUser(name), Organizations: []string{nodesGroup}, Server: true,
		DNSNames: []string{name}, IPs: []net.IP{joining.NodeAddress(name).AsSlice()},
	}
	if source.IsValid() && !slices.Contains(s.cfg.OwnAddresses(), source) {
		serving.IPs = append(serving.IPs, source.AsSlice())
	}
	a := joining.Answer{Clients: string(s.cfg.ClientCA.PEM()), Cluster: s.Cluster()}
	for _, c := range []struct {
		by   *pki.Authority
		leaf pki.Leaf
		into *string
	}{
		{s.cfg.ClientCA, pki.Leaf{CommonName: joining.NodeUser(name), Organizations: []string{nodesGroup}, Client: true}, &a.Client},
		{s.cfg.ClientCA, pki.Leaf{CommonName: s.cfg.NetworkGroup + ":" + name, Organizations: []string{s.cfg.NetworkGroup}, Client: true}, &a.Network},
		{s.cfg.KubeletCA, serving, &a.Serving},
	} {
		signed, err := c.by.Sign(key, c.leaf, s.cfg.Life, s.now())
		if err != nil {
			return joining.Answer{}, fmt.Errorf("sign for node %s: %w", name, err)
		}
		*c.into = string(signed)
	}
	return a, nil
}

// nodesGroup is Kubernetes' group of kubelets.
const nodesGroup = "system:nodes"
