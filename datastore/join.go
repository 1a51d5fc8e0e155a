package datastore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.etcd.io/etcd/server/v3/storage/wal"

	"kedge/internal/atomicfile"
)

// removedFile marks the directory of a member that was removed, so that it is not opened again.
const removedFile = "removed"

// HoldsStore reports whether dir holds the store of a member. If it does, Config.Join is ignored.
func HoldsStore(dir string) (bool, error) {
	_, err := os.Stat(filepath.Join(dir, newFile))
	if err == nil {
		return false, nil // its creation was interrupted; the next start creates it again
	}
	if !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	return wal.Exist(filepath.Join(dir, memberDir, "wal")), nil
}

// SetAside makes room in dir for a new member, after ErrRemoved. It renames dir, with the whole old store, to a name that
// holds the time, and returns the new path. The store must not be running. If dir is empty or missing, SetAside does
// nothing and returns no path.
func SetAside(dir string, now time.Time) (kept string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0 {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return "", err
	}
	kept = dir + ".removed-" + now.UTC().Format("20060102T150405Z")
	if _, err := os.Lstat(kept); err == nil {
		return "", errors.Join(fmt.Errorf("%s exists already", kept), lock.Close())
	}
	err = os.Rename(dir, kept)
	if err == nil {
		err = atomicfile.SyncDir(filepath.Dir(dir))
	}
	return kept, errors.Join(err, lock.Close())
}

// markRemoved marks the directory, so that it is not opened again.
func markRemoved(dir string) error {
	return atomicfile.Write(filepath.Join(dir, removedFile), nil, 0o600)
}

// Removed reports whether dir holds the store of a removed member, whose Run returns ErrRemoved.
func Removed(dir string) (bool, error) {
	_, err := os.Stat(filepath.Join(dir, removedFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// awaitMemberList gets the list of members from another member, and retries until the list holds this one. The list of the
// admission may be outdated. ErrRemoved means that this member was removed again, which a member that has seen the removal
// reports; see peers.Mesh.Removed.
func (s *Store) awaitMemberList(ctx context.Context) (types.URLsMap, error) {
	logged := false
	for {
		members, err := s.fetchMemberList(ctx)
		switch {
		case err == nil:
			return members, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !logged:
			s.log.Info("waiting for a member of the datastore to join", "err", err)
			logged = true
		}
		select {
		case <-s.mesh.Removed():
			return nil, ErrRemoved
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(joinRetryInterval / 4):
		}
	}
}

func (s *Store) fetchMemberList(ctx context.Context) (types.URLsMap, error) {
	c := s.book.Get()
	err := errors.New("no other member answers")
	for _, p := range c.Others {
		at := s.mesh.Location(p.ID)
		if !at.IsValid() {
			continue
		}
		var data []byte
		var header http.Header
		if data, header, err = s.mesh.Get(ctx, at, "/members"); err != nil {
			continue
		}
		if cluster := header.Get("X-Etcd-Cluster-ID"); cluster != c.Cluster {
			err = fmt.Errorf("the member at %v belongs to the cluster %q, not %q", at, cluster, c.Cluster)
			continue
		}
		var members []*membership.Member
		if err = json.Unmarshal(data, &members); err != nil {
			continue
		}
		var urls types.URLsMap
		if urls, err = memberURLs(members, c.Self); err == nil {
			return urls, nil
		}
	}
	return nil, err
}

// errNotListed means that the other member has not applied the admission of this one yet, as on a slow machine.
var errNotListed = errors.New("the other member does not know this one yet")

// memberURLs returns the peer URLs of the members by name, or by ID for members that have not started. If the list does not
// hold this member, the error is errNotListed.
func memberURLs(members []*membership.Member, self Peer) (types.URLsMap, error) {
	out := types.URLsMap{}
	for _, m := range members {
		urls, err := types.NewURLs(m.PeerURLs)
		if err != nil {
			return nil, err
		}
		name := m.ID.String()
		if name == self.ID {
			name = self.Name
		}
		out[name] = urls
	}
	if out[self.Name] == nil {
		return nil, errNotListed
	}
	return out, nil
}
