package command

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/internal/pki"
	"kedge/server/kubeconfigs"
	"kedge/settings"
)

func kubeconfigCommand() *cli.Command {
	return &cli.Command{
		Name:   "kubeconfig",
		Usage:  "Create, list and revoke kubeconfigs for people and programs; on a server",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			createKubeconfigCommand(),
			listKubeconfigsCommand(),
			revokeKubeconfigCommand(),
		},
	}
}

const oneUser = "give the name of one user; \"kedge kubeconfig ls\" shows those that have a kubeconfig"

func createKubeconfigCommand() *cli.Command {
	groups := settings.Texts(settings.Setting{Name: "group", NoVar: true, Help: "`GROUP` of the user (can be repeated)"})
	ttl := settings.Duration(settings.Setting{Name: "ttl", Default: kubeconfigs.DefaultTTL.String(), NoVar: true,
		Help: fmt.Sprintf("`TIME` for which the kubeconfig is valid, at most %s", kubeconfigs.MaxTTL)})
	namespace := settings.Text(settings.Setting{Name: "namespace", Short: "n", NoVar: true, Help: "`NAMESPACE` of commands without one (default: \"default\")"})
	server := settings.Text(settings.Setting{Name: "server", Short: "s", NoVar: true, Help: "`URL` of the API in the kubeconfig (default: that of this server for other machines)"})
	file := settings.Text(settings.Setting{Name: "output", Short: "o", NoVar: true, Help: "new `FILE` to which it is written, readable by its owner only (default: it is printed)"})
	return leaf(cli.Command{
		Name:      "create",
		Usage:     "Create a kubeconfig with a certificate and a new key for a user",
		ArgsUsage: "USER",
		Description: "The user may do nothing before a role is bound to the name or to one of the groups, for example with\n" +
			"\"kedge kubectl create clusterrolebinding NAME --clusterrole=view --user=USER\". A user can have several\n" +
			"kubeconfigs. The private key is in the kubeconfig only.",
	}, rowsOf(settings.RunDir, groups, ttl, namespace, server, file), func(c *call) error {
		if len(c.args) != 1 {
			return badUsage("give the name of one user")
		}
		s := kubeconfigs.Spec{
			User: c.args[0], Groups: groups.In(c.values), TTL: ttl.In(c.values), Namespace: namespace.In(c.values), Server: server.In(c.values),
		}
		if err := s.Validate(); err != nil {
			return err
		}
		return c.createKubeconfig(s, file.In(c.values))
	})
}

// createKubeconfig has the running server sign a kubeconfig, and writes it to a new file, or prints it if there is none.
func (c *call) createKubeconfig(s kubeconfigs.Spec, file string) (err error) {
	out := c.out
	if file != "" {
		// Before anything is signed, which could not be stored then.
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		switch {
		case errors.Is(err, fs.ErrExist):
			return errorkind.BadSetting("output", ": %s exists; remove it or choose another name", file)
		case err != nil:
			return errorkind.BadSetting("output", ": %w", err)
		}
		defer func() {
			if err = errors.Join(err, f.Close()); err != nil {
				err = errors.Join(err, os.Remove(file))
			}
		}()
		out = f
	}
	key, keyPEM, err := pki.NewKey()
	if err != nil {
		return err
	}
	request, err := pki.Request(key)
	if err != nil {
		return err
	}
	var made control.CreatedKubeconfig
	if err := control.Post(c.ctx, settings.RunDir.In(c.values), control.CreateKubeconfigPath, url.Values{
		"user": {s.User}, "group": s.Groups, "ttl": {s.TTL.String()}, "server": {s.Server}, "request": {string(request)},
	}, &made); err != nil {
		return err
	}
	data, err := encodeKubeconfig(s, made, keyPEM)
	if err != nil {
		return err
	}
	if made.Unnamed != "" {
		fmt.Fprintf(c.errOut, "kedge: warning: clients will not accept the API's certificate of this server: %s; start the servers with --tls-san of this name\n", made.Unnamed)
	}
	if _, err := out.Write(data); err != nil {
		return fmt.Errorf("write the kubeconfig, which can be revoked with \"kedge kubeconfig revoke %s --id %s\": %w", s.User, made.ID, err)
	}
	return nil
}

// encodeKubeconfig returns the text of a kubeconfig. The names in it differ from those of other clusters, so that kubeconfigs
// can be merged.
func encodeKubeconfig(s kubeconfigs.Spec, made control.CreatedKubeconfig, key []byte) ([]byte, error) {
	u, err := url.Parse(made.Server)
	if err != nil {
		return nil, err
	}
	cluster := u.Hostname()
	name := s.User + "@" + cluster
	k := clientcmdapi.NewConfig()
	k.Clusters[cluster] = &clientcmdapi.Cluster{Server: made.Server, CertificateAuthorityData: []byte(made.Authority)}
	k.AuthInfos[name] = &clientcmdapi.AuthInfo{ClientCertificateData: []byte(made.Certificate), ClientKeyData: key}
	k.Contexts[name] = &clientcmdapi.Context{Cluster: cluster, AuthInfo: name, Namespace: s.Namespace}
	k.CurrentContext = name
	data, err := clientcmd.Write(*k)
	if err != nil {
		return nil, fmt.Errorf("encode the kubeconfig: %w", err)
	}
	return data, nil
}

func listKubeconfigsCommand() *cli.Command {
	format := output("table", "json")
	return leaf(cli.Command{Name: "ls", Usage: "List the kubeconfigs of users, also those that were revoked"}, rowsOf(settings.RunDir, format), func(c *call) error {
		var all []kubeconfigs.Listed
		if err := control.Get(c.ctx, settings.RunDir.In(c.values), control.KubeconfigsPath, nil, &all); err != nil {
			return err
		}
		if format.In(c.values) == "json" {
			return c.printJSON(all)
		}
		t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "NAME\tGROUPS\tCREATED\tENDS\tREVOKED\tID")
		for _, l := range all {
			revoked := "no"
			if !l.Revoked.IsZero() {
				revoked = l.Revoked.Format(time.RFC3339)
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", l.User, cmp.Or(strings.Join(l.Groups, ","), "-"), l.Created.Format(time.RFC3339), l.Ends.Format(time.RFC3339), revoked, l.ID)
		}
		return t.Flush()
	})
}

func revokeKubeconfigCommand() *cli.Command {
	id := settings.Text(settings.Setting{Name: "id", NoVar: true, Help: "`ID` of the only kubeconfig that is revoked (default: all of the user)"})
	return leaf(cli.Command{
		Name:      "revoke",
		Usage:     "Make the kubeconfigs of a user worthless",
		ArgsUsage: "USER",
		Description: "All servers refuse them at once, and end requests that were made with them: watches, logs and\n" +
			"shells in containers. Roles stay, and a new kubeconfig of the user has them.",
	}, rowsOf(settings.RunDir, id), func(c *call) error {
		if len(c.args) != 1 {
			return badUsage(oneUser)
		}
		if err := kubeconfigs.ValidUser(c.args[0]); err != nil {
			return errorkind.BadUsage(err)
		}
		var revoked []kubeconfigs.Listed
		if err := control.Post(c.ctx, settings.RunDir.In(c.values), control.RevokeKubeconfigPath, url.Values{
			"user": {c.args[0]}, "id": {id.In(c.values)},
		}, &revoked); err != nil {
			return err
		}
		for _, l := range revoked {
			fmt.Fprintf(c.out, "%s %s\n", l.User, l.ID)
		}
		if len(revoked) == 0 {
			fmt.Fprintln(c.errOut, "kedge: all of them were revoked before")
		}
		return nil
	})
}
