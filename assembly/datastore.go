package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"

	"kedge/datastore"
	"kedge/datastore/external"
	"kedge/datastore/hook"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/server/identity"
	"kedge/server/membership"
	"kedge/settings"
)

// store is the datastore of a server: kedge's own, or an external etcd.
type store interface {
	lifecycle.Component
	lifecycle.Checker
	lifecycle.Describer
	membership.Store
	hook.Store
	SetAddresses(addresses []netip.Addr)
}

// newStore makes the datastore. own is nil if it is an external etcd.
func newStore(s Config, id *identity.Identity, owned *datadir.Dir, log *slog.Logger) (either store, own *datastore.Store) {
	if s.etcd == nil {
		own = datastore.New(s.datastore, component(log, "datastore"))
		own.OnCreated(owned.NoteStore)
		return own, own
	}
	etcd := external.New(*s.etcd, external.Server{
		Name: s.NodeName, Cluster: id.ServerCA.Hash(), Port: uint16(s.server.HTTPSPort), Known: s.joined || owned.External() != "",
	}, s.NodeIPs, component(log, "datastore"))
	etcd.OnEntered(func() error { return owned.SetExternal(datadir.ExternalUsed) })
	etcd.OnRemoved(func() error { return owned.SetExternal(datadir.ExternalRemoved) })
	return etcd, nil
}

// externalStore composes the external datastore, if there is one.
func (c *composer) externalStore() {
	v := c.Values
	endpoints := settings.DatastoreEndpoints.In(v)
	if len(endpoints) == 0 {
		for _, row := range []settings.Of[string]{settings.DatastoreCA, settings.DatastoreCert, settings.DatastoreKey} {
			if row.In(v) != "" {
				c.fail(errorkind.BadSetting(row.Name, " is for an external etcd; give its address with --%s, or leave it out", settings.DatastoreEndpoints.Name))
			}
		}
		return
	}
	c.etcd = &external.Config{
		Endpoints: endpoints, CAFile: absolute(settings.DatastoreCA.In(v)), CertFile: absolute(settings.DatastoreCert.In(v)), KeyFile: absolute(settings.DatastoreKey.In(v)),
	}
	c.server.ExternalDatastore = true
	for _, row := range settings.For(settings.Server) {
		if (row.Category == settings.Snapshots || row.Name == settings.PeerPort.Name) && v.IsSet(row.Name) {
			c.warnings = append(c.warnings, fmt.Sprintf("--%s has no effect: the datastore is an external etcd", row.Name))
		}
	}
}

// sameDatastore returns an error if a server's data directory was made with the other kind of datastore.
func (s Config) sameDatastore() error {
	if !s.parts.ControlPlane {
		return nil
	}
	d, err := datadir.Read(s.DataDir)
	if err != nil {
		return nil // reported where the directory is opened
	}
	holds, err := datastore.HoldsStore(s.datastore.Dir)
	if err != nil {
		return err
	}
	switch {
	case s.etcd != nil && (holds || d.Store):
		return errorkind.BadSetting(settings.DatastoreEndpoints.Name, " is set, and %s has kedge's own datastore, whose objects kedge cannot move to an etcd; leave it out, or begin a new cluster in another directory with --data-dir and apply its manifests there", s.DataDir)
	case s.etcd != nil && s.joined && !s.joinedExternal:
		return errorkind.BadSetting(settings.DatastoreEndpoints.Name, " is set, and the cluster that this server has joined has kedge's own datastore; leave it out")
	case s.etcd == nil && (d.External != "" || s.joinedExternal):
		return errorkind.Permanent(fmt.Errorf("the objects of the cluster of %s are in an external etcd, and kedge cannot move them to its own datastore; start with --%s and the other settings of the etcd as before, or begin a new cluster in another directory with --data-dir", s.DataDir, settings.DatastoreEndpoints.Name))
	}
	return nil
}

// errExternal is the error of commands for kedge's own datastore on a server whose datastore is an external etcd.
var errExternal = errors.New("the datastore of this server is an external etcd, which kedge does not copy: save and restore it with etcd's own tools, and keep a copy of the server folder of the data directory, which has the cluster's keys")

// refuseExternal returns an error if the datastore of this machine's server is an external etcd, or would be.
func refuseExternal(in Input) error {
	d, err := datadir.Read(absolute(settings.DataDir.In(in.Values)))
	if err == nil && d.External != "" || len(settings.DatastoreEndpoints.In(in.Values)) > 0 {
		return errorkind.Permanent(errExternal)
	}
	return nil
}

// refuseOwnStore registers a server's handlers for commands that need kedge's own datastore.
func refuseOwnStore(requests *control.Server, encryptionFile string) {
	no := func(err error) func(context.Context, url.Values) (any, error) {
		return func(context.Context, url.Values) (any, error) { return nil, err }
	}
	// "kedge upgrade" asks before it begins, and goes on without a copy.
	requests.HandlePost(control.SaveSnapshotPath, func(context.Context, url.Values) (any, error) { return control.SavedSnapshot{}, nil })
	requests.HandlePost(control.SaveArchivePath, no(errExternal))
	requests.HandleGet(control.RecoveryKeyPath, no(errExternal))
	requests.HandlePost(control.NewRecoveryKeyPath, no(errExternal))
	keys := fmt.Errorf("the datastore of this server is an external etcd, in which kedge does not change the encryption of Secrets: all servers encrypt them with the key in %s", encryptionFile)
	requests.HandleGet(control.SecretsEncryptionPath, no(keys))
	requests.HandlePost(control.ChangeSecretsEncryptionPath, no(keys))
}
