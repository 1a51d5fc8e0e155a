package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kedge/datastore"
	"kedge/internal/atomicfile"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/internal/token"
	"kedge/server/identity"
)

// Enter is what a machine is told that is to be one more server of a cluster.
type Enter struct {
	Dir      string // <data-dir>/server
	StoreDir string // of the datastore
	Server   string // URL of a server
	Token    string // the text of one for servers; empty where the machine has joined before
	NodeName string
	Peers    []netip.AddrPort // where the other servers' stores will find this one's
}

// Entered is what a server knows that has joined others, from the answer of one.
type Entered struct {
	Cluster   joining.Cluster      `json:"cluster"`
	Admission *datastore.Admission `json:"admission"`
	// Credentials are here only until they are in files of their own.
	Credentials joining.Credentials `json:"credentials,omitempty"`
}

const (
	enteredFile = "joined.json"
	// enteringFile says that the directory is to become another server's of a
	// cluster: it must not become the first one's of a new cluster meanwhile.
	enteringFile = "joining"
)

// ErrEntering is returned for the directory of a server that has begun to join others
// and has not finished.
var ErrEntering = errors.New("this machine was told to join a cluster and has not done so yet; start it with --server and --token, or remove its data directory")

// EnteredBefore returns what the server in dir was told when it joined others, and
// false if it has not: then it is the first of its cluster, or there is none yet.
func EnteredBefore(dir string) (Entered, bool, error) {
	path := filepath.Join(dir, enteredFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(dir, enteringFile)); err == nil {
			return Entered{}, false, ErrEntering
		}
		return Entered{}, false, nil
	}
	if err != nil {
		return Entered{}, false, err
	}
	var e Entered
	if err := json.Unmarshal(data, &e); err != nil {
		return e, false, fmt.Errorf("read %s: %w; restore it from a backup, or remove the data directory and join again", path, err)
	}
	return e, true, e.unpack(dir)
}

// Do makes this machine a server of the cluster, and returns true, unless it is one
// already: it makes the node's key, shows the token, and keeps what it gets. A server
// that cannot be reached, or whose store takes no other at the moment, is asked again.
// A member that was removed joins anew; what it had is kept beside.
//
// It is idempotent, and safe to run again after a crash at any point.
func (e Enter) Do(ctx context.Context, log *slog.Logger) (Entered, bool, error) {
	t, err := e.token()
	if err != nil {
		return Entered{}, false, err
	}
	begin, err := e.mustJoin(t)
	if err != nil || !begin {
		return Entered{}, false, err
	}
	if t.Secret == "" {
		return Entered{}, false, fmt.Errorf("%w: make a token with \"kedge token create --role server\" on a server, and give it with --token", joining.ErrNotJoined)
	}
	for _, d := range []string{e.Dir, filepath.Join(e.Dir, "tls")} {
		if err := atomicfile.MkdirAll(d, 0o700); err != nil {
			return Entered{}, false, fmt.Errorf("prepare the server directory: %w", err)
		}
	}
	// First of all: with what is done next the directory could be taken for that of
	// a new cluster's first server.
	if err := atomicfile.Write(filepath.Join(e.Dir, enteringFile), nil, 0o600); err != nil {
		return Entered{}, false, err
	}
	kept, err := datastore.SetAside(e.StoreDir, time.Now())
	if err != nil {
		return Entered{}, false, fmt.Errorf("keep the datastore of this removed server: %w", err)
	}
	if kept != "" {
		log.Warn("this server was removed from the cluster and joins it anew; its old datastore is kept", "path", kept)
	}
	entered, err := e.untilDone(ctx, t, log)
	return entered, err == nil, err
}

func (e Enter) token() (token.Token, error) {
	if e.Token == "" {
		return token.Token{}, nil
	}
	t, err := token.Parse(e.Token)
	if err != nil {
		return t, fmt.Errorf("--token: %w", err)
	}
	return t, nil
}

// mustJoin reports whether this machine has to join, because it is no server of the
// cluster yet or not any more.
func (e Enter) mustJoin(t token.Token) (bool, error) {
	_, _, err := EnteredBefore(e.Dir)
	switch {
	case errors.Is(err, ErrEntering):
		return true, nil
	case err != nil:
		return false, err
	case !identity.Exists(e.Dir):
		return true, nil
	}
	path := identity.AuthorityFile(e.Dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	ca, err := pki.ParseCertificate(path, data)
	if err != nil {
		return false, err
	}
	if t.CAHash != "" && t.CAHash != pki.Hash(ca) {
		return false, fmt.Errorf("%w: its authority is %s, and the token is for %s; leave --token out, or choose another --data-dir", joining.ErrOtherCluster, pki.Hash(ca), t.CAHash)
	}
	removed, err := datastore.Removed(e.StoreDir)
	return removed && t.Secret != "", err
}

// untilDone asks until it is let in or refused.
func (e Enter) untilDone(ctx context.Context, t token.Token, log *slog.Logger) (Entered, error) {
	for wait := time.Second; ; wait = min(2*wait, lastEnterRetry) {
		entered, err := e.once(ctx, t)
		var refused *joining.Refused
		if err == nil {
			return entered, nil
		}
		if errors.As(err, &refused) || errors.Is(err, joining.ErrWrongCA) || ctx.Err() != nil {
			return Entered{}, err
		}
		log.Warn("the cluster cannot be joined yet", "err", err, "again", wait)
		select {
		case <-ctx.Done():
			return Entered{}, ctx.Err()
		case <-time.After(wait):
		}
	}
}

const lastEnterRetry = 10 * time.Second

func (e Enter) once(ctx context.Context, t token.Token) (Entered, error) {
	ca, err := joining.FetchCA(ctx, e.Server, t)
	if err != nil {
		return Entered{}, err
	}
	key, err := pki.EnsureKey(identity.NodeKeyFile(e.Dir))
	if err != nil {
		return Entered{}, err
	}
	csr, err := pki.Request(key)
	if err != nil {
		return Entered{}, err
	}
	answer, credentials, err := joining.JoinServer(ctx, e.Server, ca, key, joining.ServerRequest{
		Request: joining.Request{TokenID: t.ID, Secret: string(t.Secret), NodeName: e.NodeName, CSR: string(csr)},
		Peers:   e.Peers,
	})
	if err != nil {
		return Entered{}, fmt.Errorf("join the cluster: %w", err)
	}
	entered := Entered{Cluster: answer.Cluster, Credentials: credentials}
	if err := json.Unmarshal(answer.Admission, &entered.Admission); err != nil {
		return Entered{}, fmt.Errorf("the answer of %s cannot be used: %w", e.Server, err)
	}
	if err := entered.check(ca.Raw); err != nil {
		return Entered{}, fmt.Errorf("the answer of %s cannot be used: %w", e.Server, err)
	}
	// In one file first: a crash must not leave half of a cluster's keys, to which
	// the next start would make the other half.
	if err := entered.write(e.Dir); err != nil {
		return Entered{}, err
	}
	return entered, entered.unpack(e.Dir)
}

// check makes sure that all files are there that a server needs, and no others, and
// that the authority among them is the one that the token names.
func (e Entered) check(authority []byte) error {
	files, optional := identity.SharedFiles()
	for _, name := range files {
		if len(e.Credentials[name]) == 0 {
			return fmt.Errorf("it has no %s", name)
		}
	}
	for name := range e.Credentials {
		if !slices.Contains(files, name) && !slices.Contains(optional, name) {
			return fmt.Errorf("it has a file %q, which no server needs", name)
		}
	}
	ca, err := pki.ParseCertificate("server-ca.crt", e.Credentials[identity.AuthorityFile("")])
	if err != nil {
		return err
	}
	if !slices.Equal(ca.Raw, authority) {
		return fmt.Errorf("%w: the authority in it is another", joining.ErrWrongCA)
	}
	if e.Admission == nil || len(e.Cluster.ClusterCIDRs) == 0 || len(e.Cluster.ServiceCIDRs) == 0 || e.Cluster.ClusterDomain == "" {
		return errors.New("the cluster's settings are not whole")
	}
	return nil
}

func (e Entered) write(dir string) error {
	data, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(dir, enteredFile), append(data, '\n'), 0o600)
}

// unpack puts the credentials into their files, if that is still to do.
func (e *Entered) unpack(dir string) error {
	if len(e.Credentials) == 0 {
		return nil
	}
	for name, data := range e.Credentials {
		if _, err := atomicfile.WriteIfChanged(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	e.Credentials = nil
	if err := e.write(dir); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, enteringFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
