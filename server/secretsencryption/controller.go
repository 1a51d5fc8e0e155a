package secretsencryption

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"kedge/server/peerrequests"
)

// peers are the other servers, as the controller reaches them.
type peers interface {
	state(ctx context.Context, of address) (state, error)
	apply(ctx context.Context, to address, file []byte) (state, error)
}

// Cluster is what there is to know about the servers.
type Cluster struct {
	// Members returns the names of the servers, as agreed by a majority. It fails if one has been admitted and has not started
	// yet.
	Members func(context.Context) ([]string, error)
	// APIs returns where the APIs of the servers can be reached, ADDRESS:PORT by name.
	APIs func() map[string]string
}

// Controller is the component that carries out changes. It runs on the server that leads. Without a change it waits for one: it
// has a watch of one key.
type Controller struct {
	own     *Keeper
	peers   peers
	cluster Cluster
	prefix  string // of the keys of Secrets in the datastore
	log     *slog.Logger
	now     func() time.Time
	retry   time.Duration
	told    string // the last reason for waiting that was logged
}

// retryDelay is the time after which a change that waits, for example for a server, is looked at again.
const retryDelay = 2 * time.Second

// NewController returns the controller. own is this server's keeper, and prefix that of the keys of Secrets in the datastore.
func NewController(own *Keeper, client *Client, cluster Cluster, prefix string, log *slog.Logger) *Controller {
	return &Controller{own: own, peers: client, cluster: cluster, prefix: prefix, log: log, now: time.Now, retry: retryDelay}
}

// Name implements lifecycle.Component.
func (c *Controller) Name() string { return "encryption" }

// Run implements lifecycle.Component. It calls ready at once.
func (c *Controller) Run(ctx context.Context, ready func()) error {
	ready()
	for ctx.Err() == nil {
		if err := c.follow(ctx); err != nil && ctx.Err() == nil {
			c.log.Debug("the changes of the encryption of Secrets are not followed; trying again", "err", err, "again", c.retry)
		}
		select {
		case <-ctx.Done():
		case <-time.After(c.retry):
		}
	}
	return nil
}

// follow carries out changes until they cannot be followed any more.
func (c *Controller) follow(ctx context.Context) error {
	s, err := c.own.open()
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, _, now, err := s.Get(ctx, recordKey)
	if err != nil {
		return err
	}
	changed, ended := s.Changed(ctx, recordKey, now)
	for ctx.Err() == nil {
		idle, err := c.step(ctx, s)
		switch {
		case err != nil:
			c.wait(ctx, s, err)
			select {
			case <-ctx.Done():
			case <-time.After(c.retry):
			}
		case idle:
			select {
			case <-ctx.Done():
			case <-changed:
			case <-ended:
				return errors.New("the watch of the record has ended")
			}
		}
	}
	return nil
}

// wait notes why a stage is not over.
func (c *Controller) wait(ctx context.Context, s Store, why error) {
	if errors.Is(why, errChanged) || ctx.Err() != nil {
		return
	}
	if why.Error() != c.told {
		c.told = why.Error()
		c.log.Warn("the change of the encryption of Secrets waits", "err", why, "again", c.retry)
	}
	r, revision, err := readRecord(ctx, s)
	if err != nil || r == nil || r.Stage == None || r.Waits == why.Error() {
		return
	}
	r.Waits = why.Error()
	if _, err := writeRecord(ctx, s, r, revision); err != nil {
		c.log.Debug("the reason for waiting was not noted", "err", err)
	}
}

// step does what the present stage needs and moves to the next one. It reports whether there is nothing to do. An error means
// that the stage is not over: the step is to be repeated, by this server or by another one.
func (c *Controller) step(ctx context.Context, s Store) (idle bool, err error) {
	r, revision, err := readRecord(ctx, s)
	if err != nil {
		return false, err
	}
	if r == nil || r.Stage == None {
		return true, nil
	}
	offer, err := c.own.file()
	if err != nil {
		return false, err
	}
	switch r.Stage {
	case Distribute:
		if revision, offer, err = c.ensureKey(ctx, s, r, revision, offer); err != nil {
			return false, err
		}
	case Rewrite:
		if revision, err = c.rewrite(ctx, s, r, revision); err != nil {
			return false, err
		}
	case Drop:
		if revision, err = c.compact(ctx, s, r, revision); err != nil {
			return false, err
		}
	}
	if r.Stage != Rewrite { // it needs nothing of the servers
		if err := c.applyAll(ctx, r, offer); err != nil {
			return false, err
		}
	}
	ended := r.Stage
	r.next(c.now())
	if _, err := writeRecord(ctx, s, r, revision); err != nil {
		return false, err
	}
	c.told = ""
	c.log.Info("a stage of the change of the encryption of Secrets has ended", "change", r.Operation, "ended", ended, "next", r.Stage)
	return false, nil
}

// ensureKey makes the new key if this server does not have it: it is the first try, or the server that made it does not lead any
// more. Nobody writes with the key in this stage, so another one can take its place.
func (c *Controller) ensureKey(ctx context.Context, s Store, r *record, revision int64, offer []byte) (int64, []byte, error) {
	own, err := c.own.config()
	if err != nil {
		return 0, nil, err
	}
	if r.To.Name == plain || slices.Contains(own.ids(), r.To) {
		return revision, offer, nil
	}
	made, err := generate(r.LastKey + 1)
	if err != nil {
		return 0, nil, err
	}
	r.To, r.LastKey = made.keyID, r.LastKey+1
	if revision, err = writeRecord(ctx, s, r, revision); err != nil {
		return 0, nil, err
	}
	offer, err = c.own.withKey(made)
	return revision, offer, err
}

// compact deletes the history with the old values, once: clients that read pages of an older list have to begin again.
func (c *Controller) compact(ctx context.Context, s Store, r *record, revision int64) (int64, error) {
	if r.Compacted {
		return revision, nil
	}
	if err := s.Compact(ctx); err != nil {
		return 0, err
	}
	r.Compacted = true
	return writeRecord(ctx, s, r, revision)
}

// applyAll has every server of the cluster apply what the record says, and notes their addresses in r.
func (c *Controller) applyAll(ctx context.Context, r *record, offer []byte) error {
	return peerrequests.Everywhere{
		Own: c.own.name, Members: c.cluster.Members, APIs: c.cluster.APIs,
		Note: func(all []peerrequests.Address) { r.Servers = all },
		ApplyOwn: func(ctx context.Context) error {
			_, err := c.own.apply(ctx, offer)
			return err
		},
		ApplyOther: func(ctx context.Context, to peerrequests.Address) error {
			s, err := c.peers.apply(ctx, to, offer)
			if err == nil && !slices.Equal(s.Loaded, r.wanted()) {
				err = fmt.Errorf("it has %s", names(s.Loaded))
			}
			return err
		},
	}.Run(ctx)
}
