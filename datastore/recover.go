package datastore

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"

	"kedge/datastore/integrity"
	"kedge/datastore/peers"
)

// State is what a member that is not running holds, by its own files.
type State struct {
	Cluster string // hexadecimal
	Self    string // ID of this member, hexadecimal
	Members []StateMember
	Term    uint64

	LastIndex, LastTerm uint64    // of the last entry in its log
	Committed           uint64    // index up to which this member knows that entries are committed
	Revision            int64     // of the last write in its database; later ones may be in its log
	Changed             time.Time // when its log was last changed, by this machine's clock; a start changes it too
}

// StateMember is a member in the list of a member that is not running.
type StateMember struct {
	Peer
	Learner bool // has no vote
}

// ReadState reads what the store in dir holds, which is closed, and checks its files. It changes nothing. visit is called with
// every write to a key that is in the database, in order, with bytes that are valid until it returns; it may be nil.
func ReadState(dir string, visit func(key, value []byte)) (State, error) {
	release, err := lockStore(dir)
	if err != nil {
		return State{}, err
	}
	defer release()
	book, err := peers.OpenAddressBook(dir, "")
	if errors.Is(err, peers.ErrBookDamaged) {
		book, err = peers.NewAddressBook(dir, ""), nil
	}
	if err != nil {
		return State{}, err
	}
	found, err := integrity.ReadState(dir, known(dir, book), visit)
	if err != nil {
		return State{}, damagedAt(dir, dir, err)
	}
	s := State{
		Cluster: types.ID(found.Identity.Cluster).String(), Self: types.ID(found.Identity.Member).String(), Term: found.Term,
		LastIndex: found.LastIndex, LastTerm: found.LastTerm, Committed: found.Committed, Revision: found.Revision,
	}
	if s.Members, err = stateMembers(dir, found.Members); err != nil {
		return State{}, err
	}
	files, err := os.ReadDir(filepath.Join(dir, memberDir, "wal"))
	if err != nil {
		return State{}, err
	}
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			return State{}, err
		}
		if info.ModTime().After(s.Changed) {
			s.Changed = info.ModTime()
		}
	}
	return s, nil
}

// lockStore locks the store in dir, which must be there and have taken part in its cluster.
func lockStore(dir string) (release func() error, err error) {
	holds, err := HoldsStore(dir)
	if err != nil {
		return nil, err
	}
	if !holds {
		return nil, fmt.Errorf("%s holds no datastore; recover another server, or restore a snapshot", dir)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	if removed, err := Removed(dir); err != nil || removed {
		return nil, errors.Join(err, ErrRemoved, lock.Close())
	}
	if b, err := peers.OpenAddressBook(dir, ""); err == nil && b.Get().Joining {
		return nil, errors.Join(fmt.Errorf("the member in %s was admitted and has never taken part in its cluster, so its data is not complete; recover another server", dir), lock.Close())
	}
	return lock.Close, nil
}

// damagedAt returns err as the error for a damaged store in dir, whose files were read in copy.
func damagedAt(dir, copy string, err error) error {
	var bad *integrity.Damage
	if !errors.As(err, &bad) {
		return err
	}
	file, relErr := filepath.Rel(copy, bad.File)
	if relErr != nil {
		return errors.Join(err, relErr)
	}
	return damage(dir, filepath.Join(dir, file)+" "+bad.What)
}

// stateMembers returns the members in the database of the store in dir, and those that only its address book knows.
func stateMembers(dir string, found []integrity.Member) (all []StateMember, err error) {
	book, err := peers.OpenAddressBook(dir, "")
	if errors.Is(err, peers.ErrBookDamaged) {
		book, err = peers.NewAddressBook(dir, ""), nil
	}
	if err != nil {
		return nil, err
	}
	known := map[string]Peer{}
	for _, p := range book.All() {
		known[p.ID] = p
	}
	for _, m := range found {
		p := known[m.ID]
		delete(known, m.ID)
		if p.ID = m.ID; m.Name != "" {
			p.Name = m.Name
		}
		all = append(all, StateMember{Peer: p, Learner: m.Learner})
	}
	for _, p := range book.Get().Others {
		if _, left := known[p.ID]; left {
			all = append(all, StateMember{Peer: p, Learner: true}) // admitted a moment ago, or removed
		}
	}
	return all, nil
}

// RecoverSnapshot makes a snapshot of all that the store in dir holds, which is closed and stays as it is. The snapshot is in
// the folder work, which must not exist; the caller removes it. It is for a member whose majority is gone for good.
//
// All entries of the member's log are in the snapshot, also those that it does not know to be committed: a majority may have
// acknowledged them, and the member is told of that only with the next message. etcd's own ways lose them: a copy of the
// database lacks what the log holds, and etcd's force-new-cluster drops what is not known to be committed.
//
// etcd applies the entries, in a copy: the copy's log gets a hard state by which they all are committed.
func RecoverSnapshot(ctx context.Context, dir, work, memberName string, log *slog.Logger) (Snapshot, error) {
	copied := filepath.Join(work, "store")
	if err := copyMember(dir, copied); err != nil {
		return Snapshot{}, err
	}
	book, err := peers.OpenAddressBook(dir, memberName)
	if errors.Is(err, peers.ErrBookDamaged) {
		book, err = peers.NewAddressBook(dir, memberName), nil
	}
	if err != nil {
		return Snapshot{}, err
	}
	if _, err := integrity.Check(copied, known(dir, book)); err != nil {
		return Snapshot{}, damagedAt(dir, copied, err)
	}
	cfg := DefaultConfig()
	cfg.Dir, cfg.MemberName = copied, memberName
	s := New(cfg, log)
	last, err := commitLog(copied, s.zap)
	if err != nil {
		return Snapshot{}, fmt.Errorf("read the log of %s: %w", dir, err)
	}
	if err := s.applyLog(ctx, last); err != nil {
		return Snapshot{}, fmt.Errorf("apply the log of %s: %w", dir, err)
	}
	path := filepath.Join(work, "snapshot.db")
	if err := os.Rename(filepath.Join(copied, memberDir, "snap", "db"), path); err != nil {
		return Snapshot{}, err
	}
	if err := addHash(path); err != nil {
		return Snapshot{}, err
	}
	return VerifySnapshot(path)
}

// copyMember copies the files of etcd and the seal of the store in dir to a new folder.
func copyMember(dir, to string) error {
	release, err := lockStore(dir)
	if err != nil {
		return err
	}
	defer release()
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	size := int64(0)
	err = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		size += info.Size()
		return err
	})
	if err == nil {
		err = checkRoom(filepath.Dir(to), volumeFree, 2*size) // the copy, and the store that is made from it
	}
	if err != nil {
		return err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	if err := os.CopyFS(filepath.Join(to, memberDir), os.DirFS(filepath.Join(dir, memberDir))); err != nil {
		return err
	}
	seal, err := os.ReadFile(filepath.Join(dir, integrity.SealFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(to, integrity.SealFile), seal, 0o600)
}

// commitLog makes all entries in the log of the store in dir committed ones, and returns the index of the last.
func commitLog(dir string, log *zap.Logger) (last uint64, err error) {
	setWALSegment()
	path := filepath.Join(dir, memberDir, "wal")
	snapshots, err := wal.ValidSnapshotEntries(log, path)
	if err != nil {
		return 0, err
	}
	from := &walpb.Snapshot{}
	if n := len(snapshots); n > 0 {
		from = snapshots[n-1]
	}
	w, err := wal.Open(log, path, from)
	if err != nil {
		return 0, err
	}
	_, state, entries, err := w.ReadAll()
	if err != nil {
		return 0, errors.Join(err, w.Close())
	}
	last = from.GetIndex()
	if n := len(entries); n > 0 {
		last = entries[n-1].GetIndex()
	}
	term, vote := state.GetTerm(), state.GetVote()
	err = w.Save(&raftpb.HardState{Term: &term, Vote: &vote, Commit: &last}, nil)
	return last, errors.Join(err, w.Close())
}

// applyLog lets etcd apply all entries of the log up to last, whose member meets nobody, and closes it.
func (s *Store) applyLog(ctx context.Context, last uint64) error {
	size, _, err := volume(s.cfg.Dir)
	if err != nil {
		return err
	}
	self, err := types.NewURLs([]string{peers.NewLoopbackURL()}) // the log has the member's own
	if err != nil {
		return err
	}
	server, err := s.open(openOptions{self: self, members: types.URLsMap{s.cfg.MemberName: self}, quota: s.cfg.quota(size)})
	if err != nil {
		return err
	}
	server.Start()
	err = s.awaitApplied(ctx, server, last)
	if errors.Is(err, ErrFailed) {
		return err // its goroutines are parked
	}
	server.HardStop() // commits to the database file
	return err
}

func (s *Store) awaitApplied(ctx context.Context, server *etcdserver.EtcdServer, last uint64) error {
	tick := time.NewTicker(participationInterval)
	defer tick.Stop()
	for server.AppliedIndex() < last {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.failStop.failed:
			return s.failStop.err
		case <-server.StoppingNotify():
			return fmt.Errorf("%w by the last entries of its log", ErrRemoved) // etcd stops by itself for no other reason
		}
	}
	return nil
}

// addHash adds its hash to a database file, which makes it a snapshot.
func addHash(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(EndSnapshot(f, hex.EncodeToString(sum.Sum(nil))), f.Close())
}
