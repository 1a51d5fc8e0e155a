package accountkeys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/internal/pki"
	"kedge/server/identity"
	"kedge/server/peerrequests"
)

// API is what uses the keys in this process: the API server and the controllers.
type API interface {
	// Use makes them sign with the first key, and accept tokens of all, from its return on.
	Use(keys []pki.SigningKey) error
	// LastUse returns when a token of a key was last shown to the API server; the zero time: not since its start.
	LastUse(id string) time.Time
}

// Keeper has the keys of this server. Its methods may be called at any time.
type Keeper struct {
	name string // of this server
	dir  string // of this server: <data-dir>/server
	open Opener
	api  API
	log  *slog.Logger
	// fetch returns the content of another server's file.
	fetch func(ctx context.Context, from peerrequests.Address) ([]byte, error)
	// members returns the names of the servers.
	members func(context.Context) ([]string, error)

	change sync.Mutex // held during a change of the file

	mu      sync.Mutex // guards the fields below
	foreign bool       // the API server signs with another key
	loaded  []string   // that the API server uses; none: it has not started
}

// NewKeeper returns the keeper of the server called name, whose directory is dir. The keys are used by api. others reaches the
// other servers, and members returns the names of the servers.
func NewKeeper(name, dir string, open Opener, api API, others *Client, members func(context.Context) ([]string, error), log *slog.Logger) *Keeper {
	return &Keeper{name: name, dir: dir, open: open, api: api, fetch: others.file, members: members, log: log}
}

// SetForeign notes that tokens are signed elsewhere. Every change is refused.
func (k *Keeper) SetForeign() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.foreign = true
}

// keys returns the keys in the file.
func (k *Keeper) keys() ([]pki.SigningKey, error) {
	return pki.LoadSigningKeys(identity.AccountKeysFile(k.dir))
}

// take writes the keys to the file if it has others, and has the API server use them.
func (k *Keeper) take(from, to []pki.SigningKey) error {
	if !slices.Equal(ids(from), ids(to)) {
		if err := identity.ReplaceAccountKeys(k.dir, to); err != nil {
			return err
		}
	}
	if err := k.api.Use(to); err != nil {
		return fmt.Errorf("give the API server the keys of service accounts' tokens: %w", err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.loaded = ids(to)
	return nil
}

// settleRetry is the time after which a start that lacks a key, or cannot read the record, tries again.
const settleRetry = time.Second

// Settle brings the file to what the record says, before the API server uses it: this server may have been away, or its disk may
// be a copy. It returns when that is done, or when ctx ends. A key that the file lacks is fetched from another server.
func (k *Keeper) Settle(ctx context.Context) {
	k.change.Lock()
	defer k.change.Unlock()
	told := ""
	for {
		err := k.settle(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		if err.Error() != told {
			told = err.Error()
			k.log.Warn("the keys of service accounts' tokens are not known yet; trying again", "err", err, "again", settleRetry)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(settleRetry):
		}
	}
}

func (k *Keeper) settle(ctx context.Context) error {
	own, err := k.keys()
	if err != nil {
		return err
	}
	if k.state().Foreign != "" {
		return k.take(own, own) // for Secrets with tokens, which the controllers sign
	}
	r, err := k.read(ctx)
	if err != nil {
		return err
	}
	if r == nil {
		return k.take(own, own)
	}
	want, missing := pick(own, r.wanted())
	if len(missing) > 0 {
		want, missing = pick(own, r.tolerated())
	}
	if len(missing) > 0 {
		want, missing = pick(k.gather(ctx, own, r), r.tolerated())
	}
	if len(missing) > 0 {
		members, err := k.members(ctx)
		if err != nil {
			return fmt.Errorf("the servers of the cluster are not known: %w", err)
		}
		if !slices.Equal(members, []string{k.name}) {
			return fmt.Errorf("%s lacks the keys %s of this cluster, and no other server has answered that has them; start another server, or copy the file from it",
				identity.AccountKeysFile(k.dir), strings.Join(missing, ", "))
		}
		return k.adopt(ctx, own)
	}
	if !slices.Equal(ids(own), ids(want)) {
		k.log.Info("the keys of service accounts' tokens were brought up to date", "had", ids(own), "has", ids(want))
	}
	return k.take(own, want)
}

// adopt makes the keys of this server, the only one, those of the cluster: the others are lost, with a disk, or because the file
// and the datastore come from different moments.
func (k *Keeper) adopt(ctx context.Context, own []pki.SigningKey) error {
	s, err := k.open()
	if err != nil {
		return err
	}
	defer s.Close()
	r, revision, err := readRecord(ctx, s)
	if err != nil {
		return err
	}
	if r == nil {
		return errChanged
	}
	lost := r.wanted()
	r.Keys, r.Stage, r.To, r.Waits = ids(own), None, "", ""
	if _, err := writeRecord(ctx, s, r, revision); err != nil {
		return err
	}
	k.log.Warn("keys of service accounts' tokens are lost, and their tokens are not accepted any more", "had", lost, "has", r.Keys)
	return k.take(own, own)
}

// read returns the record, nil if there is none.
func (k *Keeper) read(ctx context.Context) (*record, error) {
	s, err := k.open()
	if err != nil {
		return nil, err
	}
	defer s.Close()
	r, _, err := readRecord(ctx, s)
	return r, err
}

// gather adds the keys of other servers.
func (k *Keeper) gather(ctx context.Context, own []pki.SigningKey, r *record) []pki.SigningKey {
	all := slices.Clone(own)
	for _, server := range r.Servers {
		if server.Name == k.name {
			continue
		}
		data, err := k.fetch(ctx, server)
		if err == nil {
			var theirs []pki.SigningKey
			theirs, err = pki.ParseSigningKeys(server.Name, data)
			all = append(all, theirs...)
		}
		if err != nil {
			k.log.Debug("another server's keys of service accounts' tokens were not fetched", "server", server.Name, "err", err)
		}
	}
	return all
}

// state is what a server has.
type state struct {
	Name    string               `json:"name"`
	Loaded  []string             `json:"loaded"`            // IDs of the keys that the API server uses, in their order
	Used    map[string]time.Time `json:"used,omitempty"`    // when a token of a key was last shown
	Foreign string               `json:"foreign,omitempty"` // why kedge may not replace its key
}

// state returns what this server has.
func (k *Keeper) state() state {
	k.mu.Lock()
	defer k.mu.Unlock()
	s := state{Name: k.name, Loaded: k.loaded, Used: map[string]time.Time{}}
	for _, id := range k.loaded {
		if at := k.api.LastUse(id); !at.IsZero() {
			s.Used[id] = at
		}
	}
	if k.foreign {
		s.Foreign = "the API server of " + k.name + " signs with --kube-apiserver-arg=service-account-signing-endpoint; replace the key there"
	}
	return s
}

// apply brings the file and the API server to what the record says, with keys of the offered file that are not in its own. Only
// the record decides, so that a server that has led before cannot bring back what it believes. It is idempotent.
func (k *Keeper) apply(ctx context.Context, offered []byte) (state, error) {
	k.change.Lock()
	defer k.change.Unlock()
	s := k.state()
	if s.Foreign != "" {
		return s, errors.New(s.Foreign)
	}
	if s.Loaded == nil {
		return s, errors.New("the API server is starting")
	}
	own, err := k.keys()
	if err != nil {
		return s, err
	}
	r, err := k.read(ctx)
	if err != nil {
		return s, err
	}
	if r == nil {
		return s, errors.New("no change of the key was begun")
	}
	offer, err := pki.ParseSigningKeys("what is offered", offered)
	if err != nil {
		return s, err
	}
	want, missing := pick(slices.Concat(own, offer), r.wanted())
	if len(missing) > 0 {
		return s, fmt.Errorf("neither this server nor the one that leads has %s", strings.Join(missing, ", "))
	}
	if slices.Equal(ids(own), ids(want)) && slices.Equal(s.Loaded, ids(want)) {
		return s, nil
	}
	if err := k.take(own, want); err != nil {
		return s, err
	}
	k.log.Info("the keys of service accounts' tokens have changed", "signs", want[0].ID, "accepts", ids(want))
	return k.state(), nil
}

// file returns the content of a file with the keys of this server, and one more.
func (k *Keeper) file(more ...pki.SigningKey) ([]byte, error) {
	own, err := k.keys()
	if err != nil {
		return nil, err
	}
	return pki.EncodeSigningKeys(append(own, more...))
}

// pick returns the keys with these IDs, and the IDs of those that are not there.
func pick(keys []pki.SigningKey, want []string) (picked []pki.SigningKey, missing []string) {
	for _, id := range want {
		if i := slices.IndexFunc(keys, func(k pki.SigningKey) bool { return k.ID == id }); i >= 0 {
			picked = append(picked, keys[i])
		} else {
			missing = append(missing, id)
		}
	}
	return picked, missing
}

func ids(keys []pki.SigningKey) (out []string) {
	for _, k := range keys {
		out = append(out, k.ID)
	}
	return out
}
