package secretsencryption

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"kedge/internal/control"
)

// Administration is how an administrator changes the encryption, on any server.
type Administration struct {
	own     *Keeper
	peers   peers
	cluster Cluster
}

// NewAdministration returns the administration on the server whose keeper is own. Cluster.Members may fail.
func NewAdministration(own *Keeper, client *Client, cluster Cluster) *Administration {
	return &Administration{own: own, peers: client, cluster: cluster}
}

// Begin begins a change, which the server that leads carries out.
func (a *Administration) Begin(ctx context.Context, op Operation) error {
	if !slices.Contains([]Operation{Rotate, Enable, Disable}, op) {
		return fmt.Errorf("%q is no change of the encryption", op)
	}
	if s := a.own.state(); s.Foreign != "" {
		return fmt.Errorf("%s; change it yourself, on every server, as the documentation of Kubernetes says", s.Foreign)
	}
	own, err := a.own.config()
	if err != nil {
		return err
	}
	s, err := a.own.open()
	if err != nil {
		return err
	}
	defer s.Close()
	before, revision, err := readRecord(ctx, s)
	if err != nil {
		return err
	}
	r, err := begin(op, before, own.ids(), time.Now())
	if err != nil {
		return err
	}
	if _, err := writeRecord(ctx, s, r, revision); err != nil {
		if errors.Is(err, errChanged) {
			err = errors.New("somebody else has begun a change of the encryption at the same time; \"kedge secrets-encrypt status\" shows it")
		}
		return err
	}
	a.own.log.Info("a change of the encryption of Secrets begins", "change", op)
	return nil
}

// Status returns how Secrets are encrypted, how far a change is, and what each server has. It asks all servers.
func (a *Administration) Status(ctx context.Context) (control.SecretsEncryption, error) {
	own := a.own.state()
	st := control.SecretsEncryption{Foreign: own.Foreign}
	r, err := a.own.read(ctx)
	if err != nil {
		return st, err
	}
	wanted := own.Loaded
	if r != nil {
		wanted = r.wanted()
		st.Change, st.Stage, st.Waits, st.Began, st.Ended = string(r.Operation), string(r.Stage), r.Waits, r.Began, r.Ended
		st.Done, st.Total = r.Done, r.Total
	}
	if own.Foreign == "" && len(wanted) > 0 {
		st.Encrypted, st.Provider = wanted[0].Name != plain, plain
		if st.Encrypted {
			st.Provider, st.Key = "secretbox", wanted[0].Name
		}
	}
	st.Servers = a.servers(ctx, own, wanted)
	return st, nil
}

// servers asks all servers what they have.
func (a *Administration) servers(ctx context.Context, own state, wanted []keyID) []control.EncryptingServer {
	apis := a.cluster.APIs()
	members, err := a.cluster.Members(ctx)
	if err != nil { // one that has not started is shown by those that have
		members = slices.Collect(maps.Keys(apis))
	}
	slices.Sort(members)
	out := make([]control.EncryptingServer, len(members))
	var group sync.WaitGroup
	for i, name := range members {
		group.Go(func() {
			has, err := own, error(nil)
			if api, known := apis[name]; name != a.own.name && !known {
				err = errors.New("its API is not known yet")
			} else if name != a.own.name {
				has, err = a.peers.state(ctx, address{Name: name, API: api})
			}
			out[i] = control.EncryptingServer{Name: name, Keys: []string{}}
			if err != nil {
				out[i].Problem = err.Error()
				return
			}
			for _, id := range has.Loaded {
				out[i].Keys = append(out[i].Keys, id.Name)
			}
			out[i].Problem, out[i].Current = has.Foreign, has.Foreign == "" && slices.Equal(has.Loaded, wanted)
		})
	}
	group.Wait()
	return out
}
