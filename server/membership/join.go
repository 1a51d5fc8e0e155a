package membership

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
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/server/identity"
)

// Joiner makes this machine one more server of a cluster.
type Joiner struct {
	Dir      string // <data-dir>/server
	StoreDir string // of the datastore
	Server   string // URL of a server
	Token    string // for servers; empty if the machine has joined before
	NodeName string
	Peers    []netip.AddrPort // addresses of this machine's store for the other servers
	External bool             // the datastore is outside of kedge
	// StoreLost says that the machine had a datastore and has none: it cannot go on as the member that it was.
	StoreLost bool
	// Forget is called when the machine begins to join, and has no datastore until it has joined.
	Forget func() error
}

// Joined is what a server that has joined others was told by one of them.
type Joined struct {
	Cluster   joining.Cluster
	Admission *datastore.Admission
}

// unfinishedFile says that the machine has begun to join others: its directory must not become that of the first server of a
// new cluster meanwhile.
const unfinishedFile = "joining"

// ErrUnfinished is returned for the directory of a server that has begun to join others
// and has not finished.
var ErrUnfinished = errors.New("this machine was told to join a cluster and has not done so yet; start it with --server and --token, or remove its data directory")

// JoinedBefore returns what the server in dir was told when it joined others, and
// false if it has not: then it is the first of its cluster, or there is none yet.
func JoinedBefore(dir string) (Joined, bool, error) {
	s, joined, err := joining.ReadState(joining.Server, dir)
	if err != nil {
		return Joined{}, false, err
	}
	// A state with credentials is that of a join that has succeeded. Another is of an earlier join, if the server was removed
	// and has begun to join anew.
	if !joined || len(s.Credentials) == 0 {
		if _, err := os.Stat(filepath.Join(dir, unfinishedFile)); err == nil {
			return Joined{}, false, ErrUnfinished
		}
		if !joined {
			return Joined{}, false, nil
		}
	}
	j, err := joinedBy(s)
	if err != nil {
		return Joined{}, false, errorkind.Permanent(fmt.Errorf("read %s: %w; restore it from a backup, or remove the data directory and join again", joining.StateFile(joining.Server, dir), err))
	}
	return j, true, unpack(s, dir)
}

// joinedBy is what a state says.
func joinedBy(s joining.State) (Joined, error) {
	j := Joined{Cluster: s.Cluster}
	if s.Restored {
		return j, nil
	}
	if err := json.Unmarshal(s.Admission, &j.Admission); err != nil {
		return Joined{}, fmt.Errorf("the admission to the datastore: %w", err)
	}
	return j, nil
}

// LostSettings is the error of a server in dir that has joined others and does not have any more what it was told then.
func LostSettings(dir string) error {
	return fmt.Errorf("%s is missing: it has the settings of the cluster that this server joined; restore it from a backup, or remove the server on another one and join it anew in an empty data directory",
		joining.StateFile(joining.Server, dir))
}

// Join makes this machine a server of the cluster, and returns true, unless it is one
// already: it makes the node's key, shows the token, and keeps what it gets. A server
// that cannot be reached, or whose store admits no other at the moment, is asked again.
// A member that was removed joins anew; what it had is kept beside.
//
// It is idempotent, and safe to run again after a crash at any point.
func (j Joiner) Join(ctx context.Context, log *slog.Logger) (Joined, bool, error) {
	c := j.client()
	if j.Token != "" {
		if _, err := c.ParseToken(""); err != nil {
			return Joined{}, false, err
		}
	}
	begin, err := j.mustJoin(c)
	if err != nil || !begin {
		return Joined{}, false, err
	}
	if _, err := c.ParseToken(""); err != nil {
		return Joined{}, false, err
	}
	for _, d := range []string{j.Dir, filepath.Join(j.Dir, "tls")} {
		if err := atomicfile.MkdirAll(d, 0o700); err != nil {
			return Joined{}, false, fmt.Errorf("prepare the server directory: %w", err)
		}
	}
	// First of all: with what is done next the directory could be taken for that of
	// a new cluster's first server.
	if err := atomicfile.Write(filepath.Join(j.Dir, unfinishedFile), nil, 0o600); err != nil {
		return Joined{}, false, err
	}
	if err := errors.Join(j.Forget(), identity.Forget(j.Dir)); err != nil {
		return Joined{}, false, err
	}
	kept, err := datastore.SetAside(j.StoreDir, time.Now())
	if err != nil {
		return Joined{}, false, fmt.Errorf("keep the datastore of this removed server: %w", err)
	}
	if kept != "" {
		log.Warn("this server was removed from the cluster and joins it anew; its old datastore is kept", "path", kept)
	}
	var joined Joined
	err = c.Join(ctx, log, func(a joining.Admission) (err error) {
		if joined, err = j.keep(a); err != nil {
			return fmt.Errorf("keep the answer of %s: %w", j.Server, err)
		}
		return nil
	})
	return joined, err == nil, err
}

// Validate returns all mistakes in the settings of a machine that is to join, joined.
func (j Joiner) Validate() error { return j.client().Validate() }

func (j Joiner) client() joining.Client {
	return joining.Client{
		Role: joining.Server, Server: j.Server, Token: j.Token, NodeName: j.NodeName, KeyFile: identity.NodeKeyFile(j.Dir), Peers: j.Peers, External: j.External,
	}
}

// mustJoin reports whether this machine has to join, because it is no server of the
// cluster yet or not any more.
func (j Joiner) mustJoin(c joining.Client) (bool, error) {
	_, _, err := JoinedBefore(j.Dir)
	switch {
	case errors.Is(err, ErrUnfinished):
		return true, nil
	case err != nil:
		return false, err
	case !identity.Exists(j.Dir):
		return true, nil
	}
	path := identity.AuthorityFile(j.Dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	ca, err := pki.ParseCertificate(path, data)
	if err != nil {
		return false, err
	}
	if err := c.CheckCluster(ca); err != nil {
		return false, err
	}
	removed, err := datastore.Removed(j.StoreDir)
	return (removed || j.StoreLost) && j.Token != "", err
}

// keep stores what the server was told. In one file first: a crash must not leave half of a cluster's keys, to which the
// next start would make the other half.
func (j Joiner) keep(a joining.Admission) (Joined, error) {
	joined, err := joinedBy(a.State)
	if err == nil && joined.Admission != nil && joined.Admission.External != j.External { // of an older server, which does not compare
		err = errorkind.Permanent(fmt.Errorf("%s has another datastore than this server, with or without --datastore-endpoint", j.Server))
	}
	if err == nil {
		err = checkCredentials(a.State.Credentials, a.CA.Raw)
	}
	if err == nil {
		err = a.State.Write(joining.Server, j.Dir)
	}
	if err == nil {
		err = unpack(a.State, j.Dir)
	}
	return joined, err
}

// checkCredentials makes sure that all files are there that a server needs, and no others, and that the authority among them
// is the one that the token names.
func checkCredentials(c joining.Credentials, authority []byte) error {
	files, optional := identity.SharedFiles()
	for _, name := range files {
		if len(c[name]) == 0 {
			return fmt.Errorf("it has no %s", name)
		}
	}
	for name := range c {
		if !slices.Contains(files, name) && !slices.Contains(optional, name) {
			return fmt.Errorf("it has a file %q, which no server needs", name)
		}
	}
	ca, err := pki.ParseCertificate("server-ca.crt", c[identity.AuthorityFile("")])
	if err != nil {
		return err
	}
	if !slices.Equal(ca.Raw, authority) {
		return fmt.Errorf("%w: the authority in it is another", joining.ErrWrongCA)
	}
	return nil
}

// unpack puts the credentials of a state into their files, if that is still to do.
func unpack(s joining.State, dir string) error {
	if len(s.Credentials) == 0 {
		return nil
	}
	for name, data := range s.Credentials {
		if _, err := atomicfile.WriteIfChanged(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	// As long as the credentials are in the state it is known that the machine has joined.
	if err := os.Remove(filepath.Join(dir, unfinishedFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := atomicfile.SyncDir(dir); err != nil {
		return err
	}
	s.Credentials = nil
	return s.Write(joining.Server, dir)
}
