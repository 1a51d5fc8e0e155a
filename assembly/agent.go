package assembly

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"

	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/lifecycle"
	"kedge/internal/servers"
	"kedge/server/witness"
	"kedge/settings"
)

// composeAgentStart composes the configuration with which an agent starts, before it joins. Errors in settings are found here,
// before a token is used.
func composeAgentStart(in Input) (Config, joining.Config, error) {
	v := in.Values
	dataDir := absolute(settings.DataDir.In(v))
	nodeName, err := in.Host.nodeName(v)
	if err != nil {
		return Config{}, joining.Config{}, errorkind.Permanent(err)
	}
	jc := joining.Config{Dir: agentDir(dataDir), Server: settings.JoinServer.In(v), Token: in.Token, NodeName: nodeName}
	if err := jc.Validate(); err != nil {
		return Config{}, jc, errorkind.BadUsage(err)
	}
	if _, err := os.Stat(filepath.Join(dataDir, "server", "tls")); err == nil {
		return Config{}, jc, errorkind.Permanent(fmt.Errorf("%s is the data directory of a server; start it with \"kedge server\", or choose another with --data-dir", dataDir))
	}
	if witness.Joined(witnessDir(dataDir)) {
		return Config{}, jc, errorkind.Permanent(fmt.Errorf("%s is the data directory of a witness; start it with \"kedge server --witness\", or choose another with --data-dir", dataDir))
	}
	s, err := composeAgent(in, settings.DefaultCluster(), netip.Addr{})
	if err == nil {
		err = s.checkArgs()
	}
	return s, jc, err
}

// RunAgent joins the cluster if the machine has not joined before, and runs the node.
func RunAgent(ctx context.Context, in Input) error {
	s, jc, err := composeAgentStart(in)
	if err != nil {
		return err
	}
	list, damaged, err := servers.Load(filepath.Join(jc.Dir, serversFile), jc.Server)
	if err != nil {
		return err
	}
	jc.Servers = list
	var member *joining.Member
	return runNode(ctx, in.Build, s, hooks{
		settle: func(ctx context.Context, _ *datadir.Dir, log *slog.Logger) (Config, error) {
			if damaged != nil {
				component(log, "servers").Warn("the list of servers is damaged; starting with the servers from the settings", "err", damaged)
			}
			var err error
			if member, err = joining.Prepare(ctx, jc, component(log, "join")); err != nil {
				return Config{}, err
			}
			return composeAgent(in, member.Cluster(), member.Address())
		},
		wire: func(group *lifecycle.Group, s Config, _ *datadir.Dir, log *slog.Logger) error {
			return wireAgent(in.Build, group, s, member, list, log)
		},
		ready:    func(Config, *slog.Logger) {},
		onlyNode: true,
	})
}
