package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"kedge/datastore"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/lifecycle"
	"kedge/server/identity"
	"kedge/server/membership"
	"kedge/server/snapshots"
	"kedge/server/witness"
	"kedge/settings"
)

// composeServerStart composes the configuration with which a server starts, before it joins others. Errors in settings are
// found here, before a token is used.
func composeServerStart(in Input) (s Config, joiner membership.Joiner, joinedBefore bool, err error) {
	v := in.Values
	dataDir := absolute(settings.DataDir.In(v))
	if _, joined, err := joining.ReadState(joining.Agent, agentDir(dataDir)); err != nil {
		return s, joiner, false, fmt.Errorf("check whether %s belongs to an agent: %w", dataDir, err)
	} else if joined {
		return s, joiner, false, errorkind.Permanent(fmt.Errorf("%s is the data directory of an agent; start it with \"kedge agent\", or choose another with --data-dir", dataDir))
	}
	if witness.Joined(witnessDir(dataDir)) {
		return s, joiner, false, errorkind.Permanent(fmt.Errorf("%s is the data directory of a witness; start it with --witness, or choose another with --data-dir", dataDir))
	}
	dir := serverDir(dataDir)
	before, joinedBefore, err := membership.JoinedBefore(dir)
	if err != nil && !(errors.Is(err, membership.ErrUnfinished) && settings.JoinServer.In(v) != "") {
		return s, joiner, false, err
	}
	var answer *membership.Joined
	if joinedBefore {
		answer = &before
	}
	if s, err = composeServer(in, answer); err == nil {
		err = errors.Join(s.checkArgs(), s.sameDatastore())
	}
	if err != nil {
		return s, joiner, joinedBefore, err
	}
	joiner = membership.Joiner{Dir: dir, StoreDir: s.datastore.Dir, Server: settings.JoinServer.In(v), Token: in.Token, NodeName: s.NodeName, Peers: s.peers(), External: s.etcd != nil}
	if joiner.Server != "" {
		err = joiner.Validate()
	}
	return s, joiner, joinedBefore, err
}

// RunServer joins other servers if --server is set, and runs the control plane, and a node unless it is
// disabled. With --witness it runs a witness.
func RunServer(ctx context.Context, in Input) error {
	if settings.Witness.In(in.Values) {
		return runWitness(ctx, in)
	}
	s, joiner, joinedBefore, err := composeServerStart(in)
	if err != nil {
		return err
	}
	dir := joiner.Dir
	err = runNode(ctx, in.Build, s, hooks{
		settle: func(ctx context.Context, owned *datadir.Dir, log *slog.Logger) (Config, error) {
			if err := snapshots.EndInterrupted(s.DataDir); err != nil {
				component(log, "snapshots").Warn("what an interrupted restore has left stays", "err", err)
			}
			if err := datastore.ReleaseReserve(s.datastore.Dir, component(log, "datastore")); err != nil {
				return s, err
			}
			lost, err := storeLost(owned, s.datastore.Dir, false)
			if joiner.Server != "" && err == nil {
				joiner.StoreLost, joiner.Forget = lost != nil || owned.External() == datadir.ExternalRemoved, owned.ForgetStore
				others, joined, err := joiner.Join(ctx, component(log, "join"))
				if err != nil {
					return s, err
				}
				if joined {
					composed, err := composeServer(in, &others)
					return composed, errors.Join(err, owned.NoteJoined())
				}
			}
			return s, errors.Join(err, lost, noteJoined(owned, dir, joinedBefore))
		},
		wire: func(group *lifecycle.Group, s Config, owned *datadir.Dir, log *slog.Logger) error {
			cfg := s.server.Identity()
			var err error
			if cfg.Established, err = datastore.HoldsStore(s.datastore.Dir); err != nil {
				return err
			}
			cfg.Established = cfg.Established || owned.External() != ""
			id, err := identity.Prepare(cfg, time.Now())
			if err != nil {
				return err
			}
			return wireServer(in.Build, group, s, id, owned, log)
		},
		ready: func(s Config, log *slog.Logger) {
			log.Info("other machines can join; \"kedge token create\" prints the command for them", "server", s.cluster.Servers[0])
		},
	})
	if errors.Is(err, datastore.ErrRemoved) {
		// The errors of components that miss the datastore add nothing to this error.
		return errorkind.Permanent(fmt.Errorf("%w; to join it again create a token with \"kedge token create --role server\" on another server and give it with --server and --token", datastore.ErrRemoved))
	}
	return err
}

// storeLost returns an error as lost if a server that had a datastore has none, most likely because a file
// system is not mounted. Starting an empty cluster in its place would kill the processes of all pods.
func storeLost(owned *datadir.Dir, dir string, witness bool) (lost, err error) {
	if !owned.HadStore() {
		return nil, nil
	}
	holds, err := datastore.HoldsStore(dir)
	switch {
	case err != nil || holds:
		return nil, err
	case witness:
		return datastore.LostWitness(dir), nil
	}
	return datastore.Lost(dir), nil
}

// noteJoined records in the data directory that its server has joined others, and refuses to start a server
// that has joined and has lost the answer of the others.
func noteJoined(owned *datadir.Dir, dir string, joinedBefore bool) error {
	switch {
	case joinedBefore:
		return owned.NoteJoined()
	case owned.HasJoined():
		return errorkind.Permanent(membership.LostSettings(dir))
	}
	return nil
}
