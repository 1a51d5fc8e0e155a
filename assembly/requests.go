package assembly

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"kedge/datastore"
	"kedge/internal/atomicfile"
	"kedge/internal/control"
	"kedge/internal/joining"
	"kedge/network/trace"
	"kedge/server/accountkeys"
	"kedge/server/identity"
	"kedge/server/join"
	"kedge/server/kubeconfigs"
	"kedge/server/membership"
	"kedge/server/secretsencryption"
	"kedge/server/tunnels"
)

// answerJoin registers a server's handlers for "kedge token" and "kedge node".
func answerJoin(requests *control.Server, joins *join.Service) {
	requests.HandleGet(control.TokensPath, func(ctx context.Context, _ url.Values) (any, error) { return joins.Tokens().List(ctx) })
	requests.HandlePost(control.CreateTokenPath, func(ctx context.Context, v url.Values) (any, error) {
		ttl, err := time.ParseDuration(v.Get("ttl"))
		if err != nil {
			return nil, err
		}
		uses, err := strconv.Atoi(v.Get("uses"))
		if err != nil {
			return nil, err
		}
		made, err := joins.Tokens().Create(ctx, joins.CAHash(), join.Spec{Role: joining.Role(v.Get("role")), TTL: ttl, Uses: uses, NodeName: v.Get("node-name")})
		if err != nil {
			return nil, err
		}
		return control.CreatedToken{Token: made.Reveal(), Server: joins.Cluster().Servers[0]}, nil
	})
	requests.HandlePost(control.RemoveTokenPath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, joins.Tokens().Remove(ctx, v.Get("id"))
	})
	requests.HandlePost(control.AllowNodePath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, joins.Nodes().Allow(ctx, v.Get("name"))
	})
}

// answerKubeconfigs registers a server's handlers for "kedge kubeconfig".
func answerKubeconfigs(requests *control.Server, users *kubeconfigs.Kubeconfigs, joins *join.Service, id *identity.Identity) {
	requests.HandleGet(control.KubeconfigsPath, func(ctx context.Context, _ url.Values) (any, error) { return users.List(ctx) })
	requests.HandlePost(control.CreateKubeconfigPath, func(ctx context.Context, v url.Values) (any, error) {
		ttl, err := time.ParseDuration(v.Get("ttl"))
		if err != nil {
			return nil, err
		}
		server := cmp.Or(v.Get("server"), joins.Cluster().Servers[0])
		unnamed, err := id.Unnamed(server)
		if err != nil {
			return nil, err
		}
		chain, made, err := users.Create(ctx, kubeconfigs.Spec{User: v.Get("user"), Groups: v["group"], TTL: ttl}, []byte(v.Get("request")))
		if err != nil {
			return nil, err
		}
		return control.CreatedKubeconfig{
			Certificate: string(chain), Authority: string(id.ServerCA.PEM()), Server: server, ID: made.ID, Ends: made.Ends, Unnamed: unnamed,
		}, nil
	})
	requests.HandlePost(control.RevokeKubeconfigPath, func(ctx context.Context, v url.Values) (any, error) {
		return users.Revoke(ctx, v.Get("user"), v.Get("id"))
	})
}

// refuseJoin registers the handlers of an agent or a witness for these commands, which refer to a server.
func refuseJoin(requests *control.Server, machine string) {
	elsewhere := func(context.Context, url.Values) (any, error) {
		return nil, fmt.Errorf("this machine is %s; run the command on a server", machine)
	}
	for _, path := range []string{control.TokensPath, control.KubeconfigsPath, control.RecoveryKeyPath, control.SecretsEncryptionPath, control.AccountKeysPath} {
		requests.HandleGet(path, elsewhere)
	}
	for _, path := range []string{
		control.CreateTokenPath, control.RemoveTokenPath, control.AllowNodePath, control.RemoveNodePath, control.RemoveServerPath,
		control.ConnectNodePath, control.SaveSnapshotPath, control.CreateKubeconfigPath, control.RevokeKubeconfigPath,
		control.SaveArchivePath, control.NewRecoveryKeyPath, control.ChangeSecretsEncryptionPath,
		control.RotateAccountKeysPath, control.FinishAccountKeysPath,
	} {
		requests.HandlePost(path, elsewhere)
	}
}

// answerServers registers a server's handlers for "kedge server ls", "kedge server remove" and "kedge node
// remove".
func answerServers(requests *control.Server, servers *membership.Servers) {
	listServers(requests, servers.Members)
	requests.HandlePost(control.RemoveNodePath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, servers.RemoveNode(ctx, v.Get("name"))
	})
	requests.HandlePost(control.RemoveServerPath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, servers.Remove(ctx, v.Get("name"))
	})
}

// listServers registers the handler of a server or a witness for "kedge server ls".
func listServers(requests *control.Server, list func(context.Context) ([]datastore.Member, error)) {
	requests.HandleGet(control.ServersPath, func(ctx context.Context, _ url.Values) (any, error) {
		members, err := list(ctx)
		if err != nil {
			return nil, err
		}
		all := []control.ListedServer{}
		for _, m := range members {
			l := control.ListedServer{Name: m.Name, Role: "follower", Reachable: m.Reachable, LastSeen: m.LastSeen}
			switch {
			case m.Witness:
				l.Role = "witness"
			case m.Leader:
				l.Role = "leader"
			case m.Learner:
				l.Role = "learner"
			}
			for _, a := range m.Addresses {
				l.Addresses = append(l.Addresses, a.String())
			}
			all = append(all, l)
		}
		return all, nil
	})
}

// answerConnect registers a server's handler for connections to kedge on other nodes.
func answerConnect(requests *control.Server, hub *tunnels.Hub) {
	requests.HandleConnect(control.ConnectNodePath, func(ctx context.Context, v url.Values) (net.Conn, error) {
		return hub.Node(ctx, v.Get("name"))
	})
}

// answerSnapshots registers a server's handler for snapshots of the datastore.
func answerSnapshots(requests *control.Server, store *datastore.Store, dataDir string) {
	dir := filepath.Join(dataDir, control.SnapshotFolder)
	requests.HandlePost(control.SaveSnapshotPath, func(ctx context.Context, v url.Values) (any, error) {
		name := v.Get("name")
		if name != filepath.Base(name) || strings.HasPrefix(name, ".") {
			return nil, fmt.Errorf("%q is not the name of a file", name)
		}
		if err := atomicfile.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		saved, err := store.SaveSnapshot(ctx, filepath.Join(dir, name))
		return control.SavedSnapshot(saved), err
	})
}

// answerEncryption registers a server's handlers for "kedge secrets-encrypt".
func answerEncryption(requests *control.Server, encryption *secretsencryption.Administration) {
	requests.HandleGet(control.SecretsEncryptionPath, func(ctx context.Context, _ url.Values) (any, error) { return encryption.Status(ctx) })
	requests.HandlePost(control.ChangeSecretsEncryptionPath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, encryption.Begin(ctx, secretsencryption.Operation(v.Get("change")))
	})
}

// answerAccountKeys registers a server's handlers for "kedge service-account-key".
func answerAccountKeys(requests *control.Server, accounts *accountkeys.Administration) {
	requests.HandleGet(control.AccountKeysPath, func(ctx context.Context, _ url.Values) (any, error) { return accounts.Status(ctx) })
	requests.HandlePost(control.RotateAccountKeysPath, func(ctx context.Context, v url.Values) (any, error) {
		publish, err := time.ParseDuration(v.Get("publish"))
		if err != nil {
			return nil, err
		}
		return struct{}{}, accounts.Begin(ctx, publish)
	})
	requests.HandlePost(control.FinishAccountKeysPath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, accounts.Finish(ctx, v.Get("force") == "true")
	})
}

// answerTrace registers the handler for "kedge net trace".
func answerTrace(requests *control.Server, e *trace.Tracer) {
	requests.HandleGet(control.TracePath, func(ctx context.Context, v url.Values) (any, error) {
		return e.Trace(ctx, trace.FromValues(v))
	})
}
