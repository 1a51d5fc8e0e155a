package snapshots

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"kedge/datastore"
	"kedge/server/identity"
	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/survivor"
)

// Recovery makes a server whose majority is gone for good the only one of its cluster. kedge must be stopped.
//
// The datastore becomes that of a new cluster with one member, by the way of [Restore]: killed at any moment, a recovery has done
// nothing, or everything, and the state of before is kept.
type Recovery struct {
	DataDir string // <data-dir>; absolute
	Node    string // name of this machine's node

	Log *slog.Logger
}

// leasePrefix is that of the keys of Leases in the datastore.
const leasePrefix = "/registry/leases/"

// Inspect returns what this server holds, and which other members answer. It changes nothing.
func (r Recovery) Inspect(ctx context.Context) (survivor.State, error) {
	release, err := r.lock()
	if err != nil {
		return survivor.State{}, err
	}
	defer release()
	return r.inspect(ctx)
}

func (r Recovery) dir() string { return filepath.Join(r.DataDir, serverFolder) }

func (r Recovery) lock() (release func(), err error) {
	if err := refuseWitness(r.DataDir); err != nil {
		return nil, err
	}
	if !identity.Exists(r.dir()) {
		return nil, fmt.Errorf("%s is no server's data directory; choose another with --data-dir", r.DataDir)
	}
	return lock(r.DataDir)
}

func (r Recovery) inspect(ctx context.Context) (survivor.State, error) {
	var lease *survivor.Lease
	found, err := datastore.ReadState(filepath.Join(r.dir(), storeFolder), func(key, value []byte) {
		if bytes.HasPrefix(key, []byte(leasePrefix)) {
			lease = cmp.Or(leaseIn(value), lease)
		}
	})
	if errors.Is(err, datastore.ErrRemoved) {
		err = fmt.Errorf("%w; recover another server, or restore a snapshot (see docs/recovery.md)", err)
	}
	if err != nil {
		return survivor.State{}, err
	}
	out := survivor.State{
		Server: r.Node, Cluster: found.Cluster, Read: time.Now().UTC().Truncate(time.Second),
		Term: found.Term, LastIndex: found.LastIndex, LastTerm: found.LastTerm, Committed: found.Committed, Revision: found.Revision,
		Changed: found.Changed.UTC().Truncate(time.Second), Lease: lease,
	}
	for _, m := range found.Members {
		out.Members = append(out.Members, survivor.Member{Name: m.Name, ID: m.ID, Addresses: m.Addresses, Self: m.ID == found.Self, Learner: m.Learner})
	}
	slices.SortFunc(out.Members, func(a, b survivor.Member) int { return cmp.Compare(a.Name, b.Name) })
	dialer, err := peerDialer(r.dir())
	if err != nil {
		out.NotAsked = err.Error()
		return out, nil
	}
	var probes sync.WaitGroup
	for i := range out.Members {
		if m := &out.Members[i]; !m.Self {
			probes.Go(func() { m.Answers = answering(ctx, dialer, m.Addresses) })
		}
	}
	probes.Wait()
	return out, nil
}

// leaseIn returns the Lease in a value of the datastore; nil if it is none, or one without a time.
func leaseIn(value []byte) *survivor.Lease {
	data, ok := bytes.CutPrefix(value, []byte("k8s\x00")) // Kubernetes' mark of an object in protobuf
	var object runtime.Unknown
	var lease coordinationv1.Lease
	if !ok || object.Unmarshal(data) != nil || lease.Unmarshal(object.Raw) != nil || lease.Spec.RenewTime == nil {
		return nil
	}
	out := &survivor.Lease{Name: lease.Namespace + "/" + lease.Name, Renewed: lease.Spec.RenewTime.UTC().Truncate(time.Second)}
	if lease.Spec.HolderIdentity != nil {
		out.Holder = *lease.Spec.HolderIdentity
	}
	return out
}

// Run recovers, unless there is a reason against it that force does not override. others are the states of other stopped servers.
// After an error nothing has changed, unless the error says so.
func (r Recovery) Run(ctx context.Context, others []survivor.State, force bool) (Restored, error) {
	release, err := r.lock()
	if err != nil {
		return Restored{}, err
	}
	defer release()
	if err := EndInterrupted(r.DataDir); err != nil {
		return Restored{}, err
	}
	state, err := r.inspect(ctx)
	if err != nil {
		return Restored{}, err
	}
	if err := state.Check(others); err != nil && (!force || !errors.Is(err, survivor.ErrRefused)) {
		if errors.Is(err, survivor.ErrRefused) {
			err = fmt.Errorf("%w; --force recovers all the same", err)
		}
		return Restored{}, err
	}
	had := previous{exists: true, files: map[string][]byte{}}
	restore := Restore{DataDir: r.DataDir, Node: r.Node, Log: r.Log}
	if err := restore.readPrevious(&had, r.dir(), true); err != nil {
		return Restored{}, err
	}
	work := filepath.Join(r.DataDir, workFolder)
	saved, err := datastore.RecoverSnapshot(ctx, filepath.Join(r.dir(), storeFolder), work, r.Node, r.Log)
	if err != nil {
		return Restored{}, errors.Join(err, os.RemoveAll(work))
	}
	restore.File = saved.Path
	restore.above = saved.Revision + sinceWritten(state, time.Now())
	done, err := restore.replace(archive.Header{}, had)
	return done, errors.Join(err, os.RemoveAll(work))
}

// sinceWritten is more writes than the others can have made since the last one that this server has. A start of kedge changes the
// log too, so the latest Lease counts if it is older.
func sinceWritten(s survivor.State, now time.Time) int64 {
	last := s.Changed
	if s.Lease != nil && s.Lease.Renewed.Before(last) {
		last = s.Lease.Renewed
	}
	return int64(max(now.Sub(last), 0)/time.Second) * writesASecond
}
