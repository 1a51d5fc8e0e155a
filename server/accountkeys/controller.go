package accountkeys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"kedge/internal/pki"
	"kedge/server/peerrequests"
)

// peers are the other servers, as the controller reaches them.
type peers interface {
	state(ctx context.Context, of peerrequests.Address) (state, error)
	apply(ctx context.Context, to peerrequests.Address, file []byte) (state, error)
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
	log     *slog.Logger
	now     func() time.Time
	retry   time.Duration
	told    string // the last reason for waiting that was logged
}

// retryDelay is the time after which a change that waits, for example for a server, is looked at again.
const retryDelay = 2 * time.Second

// NewController returns the controller. own is this server's keeper.
func NewController(own *Keeper, client *Client, cluster Cluster, log *slog.Logger) *Controller {
	return &Controller{own: own, peers: client, cluster: cluster, log: log, now: time.Now, retry: retryDelay}
}

// Name implements lifecycle.Component.
func (c *Controller) Name() string { return "account-keys" }

// Run implements lifecycle.Component. It calls ready at once.
func (c *Controller) Run(ctx context.Context, ready func()) error {
	ready()
	for ctx.Err() == nil {
		if err := c.follow(ctx); err != nil && ctx.Err() == nil {
			c.log.Debug("the changes of the key of service accounts' tokens are not followed; trying again", "err", err, "again", c.retry)
		}
		c.pause(ctx)
	}
	return nil
}

func (c *Controller) pause(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(c.retry):
	}
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
			c.pause(ctx)
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
		c.log.Warn("the change of the key of service accounts' tokens waits", "err", why, "again", c.retry)
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
	if r == nil || r.Stage == None || r.Stage == Keep { // which an administrator ends
		return true, nil
	}
	offer, err := c.own.file()
	if err != nil {
		return false, err
	}
	if r.Stage == Distribute {
		if revision, offer, err = c.ensureKey(ctx, s, r, revision, offer); err != nil {
			return false, err
		}
	}
	if err := c.applyAll(ctx, r, offer); err != nil {
		return false, err
	}
	if now := c.now(); r.Stage == Distribute && now.Before(r.SignsFrom) {
		return false, fmt.Errorf("the new key is published before it signs, until %s", r.SignsFrom.Format(time.RFC3339))
	}
	ended := r.Stage
	r.next(c.now())
	if _, err := writeRecord(ctx, s, r, revision); err != nil {
		return false, err
	}
	c.told = ""
	c.log.Info("a stage of the change of the key of service accounts' tokens has ended", "ended", ended, "next", r.Stage)
	return false, nil
}

// ensureKey makes the new key if this server does not have it: it is the first try, or the server that made it does not lead any
// more. Nobody signs with the key in this stage, so another one can take its place.
func (c *Controller) ensureKey(ctx context.Context, s Store, r *record, revision int64, offer []byte) (int64, []byte, error) {
	own, err := c.own.keys()
	if err != nil {
		return 0, nil, err
	}
	if r.To != "" && slices.Contains(ids(own), r.To) {
		return revision, offer, nil
	}
	made, err := pki.NewSigningKey()
	if err != nil {
		return 0, nil, err
	}
	r.To = made.ID
	if revision, err = writeRecord(ctx, s, r, revision); err != nil {
		return 0, nil, err
	}
	offer, err = c.own.file(made)
	return revision, offer, err
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
				err = fmt.Errorf("it has %s", strings.Join(s.Loaded, ", "))
			}
			return err
		},
	}.Run(ctx)
}
