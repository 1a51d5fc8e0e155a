package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/term"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-base/version"

	"kedge/datastore"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/server/identity"
	"kedge/server/snapshots"
	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/objects"
	"kedge/server/snapshots/s3"
	"kedge/server/snapshots/survivor"
	"kedge/settings"
)

// snapshots sets when and where snapshots of the cluster are taken.
func (c *composer) snapshots() {
	schedule, err := snapshots.ParseSchedule(settings.SnapshotSchedule.In(c.Values), c.NodeName)
	if err != nil {
		c.fail(errorkind.BadSetting(settings.SnapshotSchedule.Name, ": %w", err))
	}
	c.Config.snapshots = snapshots.Config{
		Folder: settings.SnapshotDir.In(c.Values), ServerDir: serverDir(c.DataDir), Node: c.NodeName,
		Kedge: c.Build.Version, Kubernetes: version.Get().GitVersion,
		Schedule: schedule, Retention: settings.SnapshotRetention.In(c.Values),
	}
	remote, err := remoteOf(c.Values)
	c.Config.snapshots.Remote = remote
	c.fail(err)
	if c.Config.snapshots.Folder == "" {
		c.Config.snapshots.Folder = filepath.Join(c.DataDir, control.SnapshotFolder)
	}
}

// remoteOf returns where snapshots are stored outside of the machine; nil for nowhere.
func remoteOf(v settings.Values) (*snapshots.Remote, error) {
	if !settings.S3.In(v) {
		return nil, nil
	}
	if name := settings.S3ConfigSecret.In(v); name != "" {
		return &snapshots.Remote{Secret: name}, nil
	}
	c := s3Config(v)
	return &snapshots.Remote{S3: c}, c.Validate()
}

// s3Config returns the settings of S3.
func s3Config(v settings.Values) s3.Config {
	return s3.Config{
		Endpoint: settings.S3Endpoint.In(v), Bucket: settings.S3Bucket.In(v), Folder: strings.Trim(settings.S3Folder.In(v), "/"),
		Region: settings.S3Region.In(v), AccessKey: settings.S3AccessKey.In(v), SecretKey: s3.Secret(settings.S3SecretKey.In(v)),
		SkipVerify: settings.S3SkipVerify.In(v), EndpointCA: settings.S3EndpointCA.In(v), Insecure: settings.S3Insecure.In(v),
		Timeout: settings.S3Timeout.In(v),
	}
}

// OpenBucket opens the bucket in the settings, for a command.
func OpenBucket(ctx context.Context, in Input) (*s3.Bucket, error) {
	if name := settings.S3ConfigSecret.In(in.Values); name != "" {
		return nil, errorkind.BadSetting(settings.S3ConfigSecret.Name, " is for a server that runs: give the command the settings of S3 as flags, variables or in the configuration file")
	}
	return s3.Open(ctx, s3Config(in.Values))
}

// wireSnapshots adds what takes snapshots of the cluster, and answers its commands.
func wireSnapshots(group *lifecycle.Group, requests *control.Server, s Config, p *controlPlane, api lifecycle.Handle, log *slog.Logger) error {
	if p.own == nil {
		return nil
	}
	client, err := kubernetes.NewForConfig(p.loopback.Admin())
	if err != nil {
		return fmt.Errorf("make the client of the recovery key: %w", err)
	}
	log = component(log, "snapshots")
	keys := snapshots.NewKeys(client.CoreV1().Secrets(metav1.NamespaceSystem), s.server.Dir, func(key archive.Key) { showFirstKey(key, log) })
	untyped, err := dynamic.NewForConfig(p.loopback.Admin())
	if err != nil {
		return fmt.Errorf("make the client of snapshots: %w", err)
	}
	var saver *snapshots.Saver
	listed := objects.Config{Folder: s.snapshots.Folder, Node: s.snapshots.Node, Cluster: p.id.ServerCA.Hash()}
	if s.snapshots.Remote != nil {
		listed.Bucket = func(ctx context.Context) (*s3.Bucket, error) { return saver.Bucket(ctx) }
	}
	list := objects.New(listed, untyped, log)
	s.snapshots.Changed = list.Changed
	saver = snapshots.NewSaver(s.snapshots, s.cluster, p.own, keys, log)
	answerArchives(requests, saver)
	group.AddRestarted(saver, api)
	group.AddRestarted(list, api)
	return nil
}

// showFirstKey shows the cluster's first recovery key to an administrator who has started kedge in a terminal. It is in no
// log, which others may read.
func showFirstKey(key archive.Key, log *slog.Logger) {
	if term.IsTerminal(int(os.Stderr.Fd())) {
		fmt.Fprintf(os.Stderr, "\nThe recovery key opens the snapshots of this cluster. Keep a copy elsewhere (\"kedge recovery-key show\" shows it again):\n%s\n\n", key.Reveal())
		return
	}
	log.Info("the cluster has a recovery key, which opens its snapshots; keep a copy of it elsewhere: \"kedge recovery-key show\" shows it")
}

// answerArchives registers a server's handlers for snapshots of the cluster and their key.
func answerArchives(requests *control.Server, saver *snapshots.Saver) {
	requests.HandlePost(control.SaveArchivePath, func(ctx context.Context, v url.Values) (any, error) {
		var lock archive.Lock
		if word := archive.Passphrase(v.Get("passphrase")); word != "" {
			if err := word.Validate(); err != nil {
				return nil, err
			}
			lock = word
		}
		saved, err := saver.Save(ctx, v.Get("name"), lock)
		return control.SavedArchive{Path: saved.Path, Size: saved.Size, Revision: saved.Header.Revision, OpenedBy: saved.Header.OpenedBy}, err
	})
	requests.HandleGet(control.RecoveryKeyPath, func(ctx context.Context, _ url.Values) (any, error) {
		key, err := saver.Keys().Current(ctx)
		if err != nil {
			return nil, err
		}
		return control.RecoveryKey{Key: key.Reveal()}, nil
	})
	requests.HandlePost(control.NewRecoveryKeyPath, func(ctx context.Context, _ url.Values) (any, error) {
		earlier, key, err := saver.Keys().New(ctx)
		if err != nil {
			return nil, err
		}
		out := control.RecoveryKey{Key: key.Reveal()}
		if !earlier.IsZero() {
			out.Earlier = earlier.Reveal()
		}
		return out, nil
	})
}

// Restore makes this machine the server of the cluster in a snapshot file. lock opens it; nil for a file with a database only.
func Restore(ctx context.Context, in Input, file string, lock archive.Lock, force bool) (snapshots.Restored, error) {
	dataDir, node, err := stoppedNode(in)
	if err != nil {
		return snapshots.Restored{}, err
	}
	done, err := snapshots.Restore{DataDir: dataDir, File: file, Lock: lock, Node: node, Force: force, Log: commandLog(slog.LevelWarn)}.Run(ctx)
	if errors.Is(err, snapshots.ErrOtherCluster) || errors.Is(err, archive.ErrWrongKey) || errors.Is(err, archive.ErrNewer) || errors.Is(err, archive.ErrDamaged) || errors.Is(err, archive.ErrNotArchive) {
		err = errorkind.Permanent(err)
	}
	return done, err
}

// stoppedNode returns the data directory of a node that does not run, and its name.
func stoppedNode(in Input) (dataDir, node string, err error) {
	if err := refuseExternal(in); err != nil {
		return "", "", err
	}
	dataDir = absolute(settings.DataDir.In(in.Values))
	if node, err = datadir.NodeName(dataDir); err == nil && node == "" {
		node, err = in.Host.nodeName(in.Values)
	}
	return dataDir, node, errorkind.Permanent(err)
}

// commandLog is the log of a command, whose output is on the standard output.
func commandLog(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

// Survivor returns what the stopped server of this machine holds, and which other servers answer.
func Survivor(ctx context.Context, in Input) (survivor.State, error) {
	r, err := recovery(in)
	if err != nil {
		return survivor.State{}, err
	}
	return r.Inspect(ctx)
}

// Recover makes the stopped server of this machine the only one of its cluster, whose majority is gone for good. others are the
// states of other stopped servers.
func Recover(ctx context.Context, in Input, others []survivor.State, force bool) (snapshots.Restored, error) {
	r, err := recovery(in)
	if err != nil {
		return snapshots.Restored{}, err
	}
	done, err := r.Run(ctx, others, force)
	if errors.Is(err, survivor.ErrImpossible) {
		err = errorkind.Permanent(err)
	}
	return done, err
}

func recovery(in Input) (snapshots.Recovery, error) {
	dataDir, node, err := stoppedNode(in)
	// etcd warns of what a recovery is for: that no other member answers.
	return snapshots.Recovery{DataDir: dataDir, Node: node, Log: commandLog(slog.LevelError)}, err
}

// ResetServer sets the datastore of a stopped server aside, so that the server joins its cluster anew. It returns where the old
// datastore is kept.
func ResetServer(in Input) (kept string, err error) {
	if err := refuseExternal(in); err != nil {
		return "", err
	}
	dataDir := absolute(settings.DataDir.In(in.Values))
	dir := serverDir(dataDir)
	if !identity.Exists(dir) {
		return "", errorkind.Permanent(fmt.Errorf("%s is no server's; choose another with --data-dir", dataDir))
	}
	lock, err := datadir.TryLock(dataDir)
	if errors.Is(err, datadir.ErrInUse) {
		return "", fmt.Errorf("%w; stop it first", err)
	}
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if kept, err = datastore.SetAside(filepath.Join(dir, "store"), time.Now()); err == nil && kept == "" {
		err = errorkind.Permanent(fmt.Errorf("%s has no datastore", dir))
	}
	return kept, err
}
