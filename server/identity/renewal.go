package identity

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"kedge/internal/pki"
)

// Renewal is the component that keeps this server's certificates good while it runs. Who
// uses them reads the files again.
type Renewal struct {
	id  *Identity
	log *slog.Logger

	mu  sync.Mutex // guards cfg, and that one writes the files at a time
	cfg Config
}

// NewRenewal makes the component; id was prepared with cfg.
func NewRenewal(cfg Config, id *Identity, log *slog.Logger) *Renewal {
	return &Renewal{cfg: cfg, id: id, log: log}
}

// lookEvery is how often it is looked whether a certificate has less than a third of its
// life left, which is months: between half of it and all, so that servers that started
// together do not do so together.
const lookEvery = 12 * time.Hour

// Name implements lifecycle.Component.
func (r *Renewal) Name() string { return "certificates" }

// Run implements lifecycle.Component. It is ready at once: the identity is good.
func (r *Renewal) Run(ctx context.Context, ready func()) error {
	ready()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(lookEvery/2 + rand.N(lookEvery/2)):
		}
		if err := r.renew(time.Now()); err != nil {
			r.log.Warn("this server's certificates were not looked after", "err", err, "again", lookEvery)
		}
	}
}

// Moved makes the certificates anew that name this machine's addresses, which are those
// of cfg from now on.
func (r *Renewal) Moved(cfg Config, now time.Time) error {
	r.mu.Lock()
	r.cfg = cfg
	r.mu.Unlock()
	if err := r.renew(now); err != nil {
		return fmt.Errorf("make certificates for this machine's addresses: %w", err)
	}
	return nil
}

// renew makes those certificates anew that are not good any more, or not for long.
func (r *Renewal) renew(now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	fresh := *r.id // others read the original
	if err := fresh.leaves(r.cfg, now); err != nil {
		return err
	}
	for _, p := range []pki.Pair{fresh.Serving, fresh.KubeletClient, fresh.ProxyClient, fresh.Admin, fresh.KubeletServing, fresh.Peer} {
		if p.Renewed {
			r.log.Info("a certificate of this server was renewed", "file", p.CertFile)
		}
	}
	return fresh.writeKubeconfig(r.cfg)
}
