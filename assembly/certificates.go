package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/logging"
	"kedge/internal/pki"
	"kedge/internal/servers"
	"kedge/server/identity"
	"kedge/server/witness"
)

// ownedBy returns whether a server, or an agent that has joined, owns a data directory. The error says that there is none.
func ownedBy(dataDir string) (server bool, agent joining.State, err error) {
	if identity.Exists(serverDir(dataDir)) {
		return true, agent, nil
	}
	agent, joined, err := joining.ReadState(joining.Agent, agentDir(dataDir))
	if err == nil && !joined {
		err = errorkind.Permanent(fmt.Errorf("there are no certificates of a node in %s; give its data directory with --data-dir", dataDir))
	}
	return false, agent, err
}

// Certificates examines the certificates of the node in dataDir.
func Certificates(dataDir, kubeconfig string) ([]pki.Examined, error) {
	if witness.Joined(witnessDir(dataDir)) {
		return witness.Certificates(witnessDir(dataDir), time.Now()), nil
	}
	server, _, err := ownedBy(dataDir)
	switch {
	case err != nil:
		return nil, err
	case server:
		return identity.Certificates(serverDir(dataDir), kubeconfig, time.Now()), nil
	}
	return joining.Certificates(agentDir(dataDir), time.Now()), nil
}

// RotateCertificates makes new certificates with the names, all without names, for the stopped node in dataDir.
func RotateCertificates(ctx context.Context, dataDir string, names []string) ([]string, error) {
	if witness.Joined(witnessDir(dataDir)) {
		return nil, errorkind.Permanent(errors.New("the certificate of a witness is renewed while it runs; start kedge, or give its run directory with --run-dir"))
	}
	server, agent, err := ownedBy(dataDir)
	if err != nil {
		return nil, err
	}
	lock, err := datadir.TryLock(dataDir)
	if errors.Is(err, datadir.ErrInUse) {
		err = fmt.Errorf("%w; give its run directory with --run-dir", err)
	}
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if server {
		return identity.Rotate(serverDir(dataDir), names, time.Now())
	}
	if err := joining.CheckNames(names); err != nil {
		return nil, err
	}
	node, err := datadir.NodeName(dataDir)
	if err != nil {
		return nil, err
	}
	list, _, err := servers.Load(filepath.Join(agentDir(dataDir), serversFile))
	if err != nil {
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	return joining.Rotate(ctx, joining.Config{Dir: agentDir(dataDir), Server: agent.Server, NodeName: node, Servers: list}, log.With(logging.Component, "join"))
}

// answerServersCertificates registers a server's handler for "kedge certificate rotate".
func answerServersCertificates(requests *control.Server, renewal *identity.Renewal) {
	requests.HandlePost(control.RotateCertificatesPath, func(_ context.Context, v url.Values) (any, error) {
		return renewal.Rotate(v["name"], time.Now())
	})
}

// answerAgentsCertificates is [answerServersCertificates] for an agent.
func answerAgentsCertificates(requests *control.Server, m *joining.Member) {
	requests.HandlePost(control.RotateCertificatesPath, func(ctx context.Context, v url.Values) (any, error) {
		if err := joining.CheckNames(v["name"]); err != nil {
			return nil, err
		}
		return m.Rotate(ctx)
	})
}
