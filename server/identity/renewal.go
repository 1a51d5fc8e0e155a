package identity

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"kedge/internal/pki"
)

// Renewal is the component that renews this server's certificates while it runs. The users of the certificates
// read the files again.
type Renewal struct {
	id  *Identity
	log *slog.Logger

	mu  sync.Mutex // guards cfg, and serialises writing the files
	cfg Config
}

// NewRenewal returns the component. id was prepared with cfg.
func NewRenewal(cfg Config, id *Identity, log *slog.Logger) *Renewal {
	return &Renewal{cfg: cfg, id: id, log: log}
}

// renewInterval is the maximum interval between checks whether a certificate has less than a third of its life
// left, that is months. The interval is random between half of it and all of it, so that servers that started
// together do not renew together.
const renewInterval = 12 * time.Hour

// Name implements lifecycle.Component.
func (r *Renewal) Name() string { return "certificates" }

// Run implements lifecycle.Component. It calls ready at once, because the identity is valid.
func (r *Renewal) Run(ctx context.Context, ready func()) error {
	ready()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(renewInterval/2 + rand.N(renewInterval/2)):
		}
		if err := r.renew(time.Now()); err != nil {
			r.log.Warn("this server's certificates could not be renewed; trying again", "err", err, "again", renewInterval)
		}
	}
}

// Moved renews the certificates that contain this machine's addresses, after a change to the addresses in cfg.
func (r *Renewal) Moved(cfg Config, now time.Time) error {
	r.mu.Lock()
	r.cfg = cfg
	r.mu.Unlock()
	if err := r.renew(now); err != nil {
		return fmt.Errorf("renew certificates for this machine's addresses: %w", err)
	}
	return nil
}

// renew signs the certificates again that are invalid or expire soon.
func (r *Renewal) renew(now time.Time) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	fresh := *r.id // other components read the original
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

// Rotate signs the certificates with the names again, all without names, with new keys except for those of the node's key,
// and writes the administrator's kubeconfig. It returns the names of the certificates.
func (r *Renewal) Rotate(names []string, now time.Time) (rotated []string, err error) {
	leaves, err := chosen(names)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	fresh := *r.id // other components read the original
	specs := append(fresh.specs(r.cfg), leafSpec{fresh.ClientCA, nodeClient, nodeLeaf(r.cfg), new(pki.Pair)})
	for _, l := range leaves {
		i := slices.IndexFunc(specs, func(s leafSpec) bool { return s.name == l.name })
		if err := l.sign(specs[i].ca, r.cfg.Dir, specs[i].leaf, now); err != nil {
			return rotated, err
		}
		rotated = append(rotated, l.name)
		r.log.Info("a certificate of this server was renewed on request", "name", l.name)
	}
	return rotated, fresh.writeKubeconfig(r.cfg)
}
