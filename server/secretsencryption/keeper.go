package secretsencryption

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/server/identity"
)

// API is the API server of this process.
type API interface {
	// Reload makes it use the configuration that is in the file now. Reads and writes that begin after it use the new one.
	Reload(ctx context.Context) error
	// CaughtUp returns when it has seen all Secrets as the datastore has them now, so that it does not read older values of
	// them any more.
	CaughtUp(ctx context.Context) error
}

// Keeper has the configuration of this server. Its methods may be called at any time.
type Keeper struct {
	name string // of this server
	dir  string // of this server: <data-dir>/server
	open Opener
	log  *slog.Logger
	// fetch returns the content of another server's file.
	fetch func(ctx context.Context, from address) ([]byte, error)

	change sync.Mutex // held during a change of the file

	mu      sync.Mutex // guards the fields below
	api     API        // nil: none yet
	foreign string     // why kedge may not replace the API server's configuration; empty if it may
	loaded  []keyID    // that the API server uses

	writes  sync.RWMutex // held for reading during writes of Secrets
	writers []provider   // whose values may be written; none: all. Guarded by writes.
}

// NewKeeper returns the keeper of the server called name, whose directory is dir. fetch returns the content of the configuration
// of another server, at ADDRESS:PORT.
func NewKeeper(name, dir string, open Opener, fetch func(ctx context.Context, name, api string) ([]byte, error), log *slog.Logger) *Keeper {
	return &Keeper{name: name, dir: dir, open: open, log: log, fetch: func(ctx context.Context, from address) ([]byte, error) {
		return fetch(ctx, from.Name, from.API)
	}}
}

// SetForeign notes why kedge may not replace the API server's configuration. Every change is refused.
func (k *Keeper) SetForeign(why string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.foreign = why
}

// SetAPI sets the API server, whose configuration kedge may replace.
func (k *Keeper) SetAPI(api API) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.api = api
}

// Managed returns nil if the file of this server is one that kedge may replace.
func (k *Keeper) Managed() error {
	_, err := k.config()
	return err
}

// config returns the configuration in the file.
func (k *Keeper) config() (configuration, error) {
	path := identity.EncryptionConfigFile(k.dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// replace writes the file, if it has other providers.
func (k *Keeper) replace(from, to configuration) error {
	if slices.Equal(from.ids(), to.ids()) {
		return nil
	}
	data, err := to.file()
	if err != nil {
		return err
	}
	return identity.ReplaceEncryption(k.dir, data)
}

// settleRetry is the time after which a start that lacks a key, or cannot read the record, tries again.
const settleRetry = time.Second

// Settle brings the file to what the record says, before the API server reads it: this server may have been away, or its disk
// may be a copy. It returns when that is done, or when ctx ends. A key that the file lacks is fetched from another server.
func (k *Keeper) Settle(ctx context.Context) error {
	k.change.Lock()
	defer k.change.Unlock()
	told := ""
	for {
		err := k.settle(ctx)
		if err == nil || errors.Is(err, ErrForeign) || ctx.Err() != nil {
			return nil // an administrator's own file is used as it is
		}
		if err.Error() != told {
			told = err.Error()
			k.log.Warn("the keys of Secrets are not known yet; trying again", "err", err, "again", settleRetry)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settleRetry):
		}
	}
}

func (k *Keeper) settle(ctx context.Context) error {
	own, err := k.config()
	if err != nil {
		return err
	}
	r, err := k.read(ctx)
	if err != nil {
		return err
	}
	if r == nil {
		k.use(own)
		return nil
	}
	want, missing := own.pick(r.wanted())
	if len(missing) > 0 {
		want, missing = own.pick(r.tolerated())
	}
	if len(missing) > 0 {
		want, missing = k.gather(ctx, own, r).pick(r.tolerated())
	}
	if len(missing) > 0 {
		return fmt.Errorf("%s lacks %s, with which Secrets of this cluster are encrypted, and no other server has answered that has it; start another server, or restore the file from a backup",
			identity.EncryptionConfigFile(k.dir), strings.Join(missing, ", "))
	}
	if !slices.Equal(own.ids(), want.ids()) {
		k.log.Info("the configuration of the encryption of Secrets was brought up to date", "had", names(own.ids()), "has", names(want.ids()))
	}
	if err := k.replace(own, want); err != nil {
		return err
	}
	k.use(want)
	return nil
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
func (k *Keeper) gather(ctx context.Context, own configuration, r *record) configuration {
	all := slices.Clone(own)
	for _, server := range r.Servers {
		if server.Name == k.name {
			continue
		}
		data, err := k.fetch(ctx, server)
		if err == nil {
			var theirs configuration
			theirs, err = parse(data)
			all = append(all, theirs...)
		}
		if err != nil {
			k.log.Debug("another server's keys of Secrets were not fetched", "server", server.Name, "err", err)
		}
	}
	return all
}

// use notes what the API server uses, and lets only its first provider write.
func (k *Keeper) use(c configuration) {
	k.mu.Lock()
	k.loaded = c.ids()
	k.mu.Unlock()
	k.allow(c[:1])
}

// allow returns when no write with another provider is under way. Later ones are refused.
func (k *Keeper) allow(writers []provider) {
	k.writes.Lock()
	defer k.writes.Unlock()
	k.writers = writers
}

// errOtherKey is the error of a write with a key that is not written with any more. It needs a request that was encrypted before
// the key changed and reaches the datastore [changeGrace] later.
var errOtherKey = errors.New("the key of Secrets has changed during the request; try again")

// Guard is for datastore.Store.GuardPuts: writes of Secrets begin with it.
func (k *Keeper) Guard(values [][]byte) (end func(), err error) {
	k.writes.RLock()
	for _, v := range values {
		if len(k.writers) > 0 && !slices.ContainsFunc(k.writers, func(p provider) bool { return p.wrote(v) }) {
			k.writes.RUnlock()
			return nil, errOtherKey
		}
	}
	return k.writes.RUnlock, nil
}

// state is what a server has.
type state struct {
	Name    string  `json:"name"`
	Loaded  []keyID `json:"loaded"`            // providers of the running API server, in their order
	Foreign string  `json:"foreign,omitempty"` // why kedge may not replace its configuration
}

// state returns what this server has.
func (k *Keeper) state() state {
	s := state{Name: k.name}
	if _, err := k.config(); err != nil {
		s.Foreign = err.Error()
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s.Loaded = k.loaded
	if k.foreign != "" && s.Foreign == "" {
		s.Foreign = ErrForeign.Error() + ": " + k.foreign
	}
	return s
}

// changeGrace is how long after a change of the key values of the old one may still be written: requests have encrypted their
// object already, and are about to write it.
const changeGrace = 100 * time.Millisecond

// apply brings the file and the API server to what the record says, with keys of the offered file that are not in its own. Only
// the record decides, so that a server that has led before cannot bring back what it believes. It is idempotent. After it this
// server writes with the first provider only.
func (k *Keeper) apply(ctx context.Context, offered []byte) (state, error) {
	k.change.Lock()
	defer k.change.Unlock()
	k.mu.Lock()
	api, loaded := k.api, k.loaded
	k.mu.Unlock()
	if s := k.state(); s.Foreign != "" {
		return s, errors.New(s.Foreign)
	}
	if api == nil {
		return state{}, errors.New("the API server is starting")
	}
	own, err := k.config()
	if err != nil {
		return state{}, err
	}
	r, err := k.read(ctx)
	if err != nil {
		return state{}, err
	}
	if r == nil {
		return state{}, errors.New("no change of the encryption was begun")
	}
	offer, err := parse(offered)
	if err != nil {
		return state{}, fmt.Errorf("the offered configuration: %w", err)
	}
	want, missing := slices.Concat(own, offer).pick(r.wanted())
	if len(missing) > 0 {
		return state{}, fmt.Errorf("neither this server nor the offered configuration has %s", strings.Join(missing, ", "))
	}
	if slices.Equal(own.ids(), want.ids()) && slices.Equal(loaded, want.ids()) {
		k.allow(want[:1])
		return k.state(), nil
	}
	if len(want) < len(loaded) {
		if err := api.CaughtUp(ctx); err != nil {
			return state{}, fmt.Errorf("wait until the API server has seen all Secrets: %w", err)
		}
	}
	if err := k.replace(own, want); err != nil {
		return state{}, err
	}
	k.allow(append(k.current(), want[0]))
	if err := api.Reload(ctx); err != nil {
		return state{}, fmt.Errorf("give the API server the configuration: %w", err)
	}
	k.mu.Lock()
	k.loaded = want.ids()
	k.mu.Unlock()
	time.Sleep(changeGrace)
	k.allow(want[:1])
	k.log.Info("the configuration of the encryption of Secrets has changed", "writes", want[0].Name, "reads", names(want.ids()))
	return k.state(), nil
}

// current returns the providers whose values may be written now.
func (k *Keeper) current() []provider {
	k.writes.RLock()
	defer k.writes.RUnlock()
	return slices.Clone(k.writers)
}

// file returns the content of this server's file, with its keys.
func (k *Keeper) file() ([]byte, error) {
	c, err := k.config()
	if err != nil {
		return nil, err
	}
	return c.file()
}

// withKey returns the content of this server's file with one more key.
func (k *Keeper) withKey(p provider) ([]byte, error) {
	c, err := k.config()
	if err != nil {
		return nil, err
	}
	return append(c, p).file()
}
