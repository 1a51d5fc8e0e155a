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

// removedFile says that the member was removed, so that the directory is not opened again.
const removedFile = "removed"

// HoldsStore reports whether dir holds the store of a member: then Config.Join is ignored.
func HoldsStore(dir string) (bool, error) {
	_, err := os.Stat(filepath.Join(dir, newFile))
	if err == nil {
		return false, nil // its creation was cut short; it will be begun afresh
	}
	if !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	return wal.Exist(filepath.Join(dir, memberDir, "wal")), nil
}

// SetAside makes room in dir for a new member, after ErrRemoved: everything of the old store is kept, in a new
// directory beside dir whose path it returns, named with the time. The store must not be running. Nothing is
// set aside, and no path returned, if there is nothing in dir.
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
		return "", errors.Join(fmt.Errorf("%s is there already", kept), lock.Close())
	}
	err = os.Rename(dir, kept)
	if err == nil {
		err = atomicfile.SyncDir(filepath.Dir(dir))
	}
	return kept, errors.Join(err, lock.Close())
}

// markRemoved keeps the directory from being opened again.
func markRemoved(dir string) error {
	return atomicfile.Write(filepath.Join(dir, removedFile), nil, 0o600)
}

// Removed reports whether dir holds the store of a member that was removed: its Run returns ErrRemoved.
func Removed(dir string) (bool, error) {
	_, err := os.Stat(filepath.Join(dir, removedFile))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// membership asks the others who the members are, until one answers that knows this one. It is asked for because
// an admission may be old: others may have come and gone since. ErrRemoved means that this member is not among them
// any more, which only one that has seen the removal can know; see [hello].
func (s *Store) membership(ctx context.Context) (types.URLsMap, error) {
	said := false
	for {
		members, err := s.askMembership(ctx)
		switch {
		case err == nil:
			return members, nil
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !said:
			s.log.Info("waiting for a member of the datastore to join", "err", err)
			said = true
		}
		select {
		case <-s.mesh.removed:
			return nil, ErrRemoved
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(lookEvery / 4):
		}
	}
}

func (s *Store) askMembership(ctx context.Context) (types.URLsMap, error) {
	c := s.book.get()
	err := errors.New("none of them answers")
	for _, w := range s.mesh.all() {
		w.mu.Lock()
		at := w.at
		w.mu.Unlock()
		if !at.IsValid() {
			continue
		}
		var data []byte
		var header http.Header
		if data, header, err = s.mesh.request(ctx, http.MethodGet, at, "/members", nil); err != nil {
			continue
		}
		if cluster := header.Get("X-Etcd-Cluster-ID"); cluster != c.Cluster {
			err = fmt.Errorf("member at %v is of the cluster %q, not %q", at, cluster, c.Cluster)
			continue
		}
		var members []*membership.Member
		if err = json.Unmarshal(data, &members); err != nil {
			continue
		}
		var urls types.URLsMap
		if urls, err = urlsOf(members, c.Self); err == nil {
			return urls, nil
		}
	}
	return nil, err
}

// errUnknown is of a member that lags behind the admission, as one does on a slow machine.
var errUnknown = errors.New("the member that answers has not heard of this one yet")

// urlsOf are the members' URLs by their names. Who has not started has no name. Without this member among them it
// is errUnknown.
func urlsOf(members []*membership.Member, self Peer) (types.URLsMap, error) {
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
		return nil, errUnknown
	}
	return out, nil
}
