package joining

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/internal/pki"
)

// Errors of a machine that is to be a member of a cluster.
var (
	ErrNotJoined    = errors.New("this machine has not joined a cluster yet")
	ErrOtherCluster = errors.New("this machine is a member of another cluster")
)

// Client asks a server to admit this machine. Agents and servers join in the same way: the role says which request the
// machine makes, and what the answer has.
type Client struct {
	Role     Role
	Server   string // URL of a server
	Token    string // as the administrator gave it; may be empty if the machine has joined before
	NodeName string
	KeyFile  string // of the machine's key, which is made if it does not exist
	// Peers are the addresses of a server's store for the other servers, best first.
	Peers []netip.AddrPort
	// External says that this server uses an external datastore.
	External bool
}

// Validate returns all mistakes in the settings of the client, joined.
func (c Client) Validate() error {
	var errs []error
	if c.Server == "" {
		errs = append(errs, errors.New("no server to join; name one with --server https://HOST:6443"))
	} else if !ValidServer(c.Server) {
		errs = append(errs, errorkind.BadSetting("server", " %q is not like https://HOST:6443", c.Server))
	}
	if c.Token != "" {
		if _, err := ParseToken(c.Token); err != nil {
			errs = append(errs, errorkind.BadSetting("token", ": %w", err))
		}
	}
	return errors.Join(errs...)
}

// ValidServer reports whether text is the URL of a server: https, a host, and a port if it is not 443.
func ValidServer(text string) bool {
	u, err := url.Parse(text)
	return err == nil && u.Scheme == "https" && u.Hostname() != "" && strings.Trim(u.Path, "/") == "" && u.RawQuery == "" && u.User == nil
}

// Admission is the answer of a server that has admitted this machine.
type Admission struct {
	CA    *x509.Certificate // of the API; it is the authority that the token names
	Key   *ecdsa.PrivateKey // of this machine
	State State             // to be written last

	Certificates Answer        // of an agent
	Witness      WitnessAnswer // of a witness
}

// ParseToken parses the client's token. Without a token the error is [ErrNotJoined]; hint says in it what may have happened
// to a machine that has joined before.
func (c Client) ParseToken(hint string) (Token, error) {
	if c.Token == "" {
		return Token{}, errorkind.Permanent(fmt.Errorf("%w%s: make a token with %q on a server, and give it with --token", ErrNotJoined, hint, c.Role.tokenCommand()))
	}
	t, err := ParseToken(c.Token)
	if err != nil {
		return Token{}, errorkind.BadSetting("token", ": %w", err)
	}
	return t, nil
}

// CheckCluster returns ErrOtherCluster if the client has a token that is not for the cluster with the authority ca, which
// this machine has joined. A token that does not name an authority may be for any cluster.
func (c Client) CheckCluster(ca *x509.Certificate) error {
	t, err := ParseToken(c.Token)
	if err != nil || t.CAHash == "" || t.CAHash == pki.Hash(ca) {
		return nil
	}
	return errorkind.Permanent(fmt.Errorf("%w: its authority is %s, and the token is for %s; leave --token out, or choose another --data-dir", ErrOtherCluster, pki.Hash(ca), t.CAHash))
}

// Join makes this machine's key, and requests to join until a server has admitted the machine and keep has stored the
// answer. A server that cannot be reached, or cannot admit a machine at the moment, is asked again, and so is one whose
// answer could not be kept. A refusal is an error that starting again does not change.
func (c Client) Join(ctx context.Context, log *slog.Logger, keep func(Admission) error) error {
	t, err := c.ParseToken("")
	if err != nil {
		return err
	}
	key, err := pki.EnsureKey(c.KeyFile)
	if err != nil {
		return errorkind.Permanent(fmt.Errorf("%w, or remove it", err))
	}
	wait := lifecycle.Backoff{First: firstRetry, Last: lastJoinRetry, Spread: 0.5}
	for {
		a, err := c.request(ctx, t, key)
		if err == nil {
			err = keep(a)
		}
		switch {
		case err == nil, ctx.Err() != nil:
			return err
		case isRefusal(err):
			return markRefusal(err)
		}
		pause := wait.Next()
		log.Warn("cannot join the cluster yet", "err", err, "again", pause.Round(time.Millisecond))
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
	}
}

const (
	firstRetry    = 500 * time.Millisecond
	lastJoinRetry = 10 * time.Second
)

// isRefusal reports whether a server has refused a request, or is not of the cluster: the same request has the same result.
func isRefusal(err error) bool {
	var refused *Refused
	return errors.As(err, &refused) || errors.Is(err, ErrWrongCA)
}

// markRefusal marks a refusal as an error that starting kedge again does not change.
func markRefusal(err error) error {
	if isRefusal(err) {
		return errorkind.Permanent(err)
	}
	return err
}

// request makes one request to join.
func (c Client) request(ctx context.Context, t Token, key *ecdsa.PrivateKey) (Admission, error) {
	ca, err := FetchCA(ctx, c.Server, t)
	if err != nil {
		return Admission{}, err
	}
	csr, err := pki.Request(key)
	if err != nil {
		return Admission{}, err
	}
	a := Admission{CA: ca, Key: key}
	r := Request{TokenID: t.ID, Secret: string(t.Secret), NodeName: c.NodeName, CSR: string(csr)}
	switch c.Role {
	case Server:
		var answer ServerAnswer
		var credentials Credentials
		answer, credentials, err = JoinServer(ctx, c.Server, ca, key, ServerRequest{Request: r, Peers: c.Peers, External: c.External})
		a.State = State{Cluster: answer.Cluster, Admission: answer.Admission, Credentials: credentials}
	case Witness:
		a.Witness, err = JoinWitness(ctx, c.Server, ca, ServerRequest{Request: r, Peers: c.Peers})
		a.State = State{Server: c.Server, Cluster: a.Witness.Cluster, Admission: a.Witness.Admission}
	default:
		var local netip.Addr
		a.Certificates, local, err = Join(ctx, c.Server, ca, r)
		a.State = State{Server: c.Server, Address: local, Cluster: a.Certificates.Cluster}
	}
	if err != nil {
		return Admission{}, fmt.Errorf("join the cluster: %w", err)
	}
	if err := a.State.check(c.Role); err != nil {
		return Admission{}, fmt.Errorf("cannot use the answer of %s: %w", c.Server, err)
	}
	return a, nil
}
