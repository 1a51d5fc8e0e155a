package joining

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"kedge/internal/errorkind"
	"kedge/internal/pki"
)

// Certificates examines all certificates of the agent in dir.
func Certificates(dir string, now time.Time) (all []pki.Examined) {
	in := func(name string) string { return filepath.Join(dir, name) }
	for _, f := range []pki.File{
		{Name: "server-ca", CertFile: in(serverCA), UsedBy: "has signed the API's certificate"},
		{Name: "client-ca", CertFile: in(clientCA), UsedBy: "has signed for clients of the API and of the kubelet"},
		{Name: "node", CertFile: in(clientFile), KeyFile: in(keyFile), AuthorityFile: in(clientCA), UsedBy: "this machine's kubelet and tunnels, towards the API"},
		{Name: "network", CertFile: in(networkFile), KeyFile: in(keyFile), AuthorityFile: in(clientCA), UsedBy: "this machine's network, towards the API"},
		// Its authority is known to the servers.
		{Name: "kubelet", CertFile: in(servingFile), KeyFile: in(keyFile), UsedBy: "this machine's kubelet, towards the API server"},
	} {
		all = append(all, f.Examine(now))
	}
	return all
}

// CheckNames returns an error if certificates are named: an agent's are made together.
func CheckNames(names []string) error {
	if len(names) > 0 {
		return errorkind.BadUsage(errors.New("the certificates of an agent are renewed together, with the same key; give no names"))
	}
	return nil
}

// Rotate requests new certificates from the servers for the agent in cfg.Dir, which must not run. It returns their names.
func Rotate(ctx context.Context, cfg Config, log *slog.Logger) ([]string, error) {
	m, joined, err := open(cfg, log)
	if err != nil {
		return nil, err
	}
	if !joined {
		return nil, ErrNotJoined
	}
	return m.Rotate(ctx)
}

// Rotate requests new certificates from the servers now, and returns their names.
func (m *Member) Rotate(ctx context.Context) ([]string, error) {
	err := m.renew(ctx)
	var refused *Refused
	switch {
	case errors.As(err, &refused):
		return nil, m.refused(err)
	case err != nil:
		return nil, fmt.Errorf("no server has renewed this node's certificates, and the old ones stay: %w", err)
	}
	m.log.Info("this node's certificates were renewed on request", "server", m.Server())
	return []string{"node", "network", "kubelet"}, nil
}
