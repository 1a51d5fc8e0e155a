package objects

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"

	"kedge/internal/lifecycle"
	"kedge/server/snapshots"
	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/s3"
)

const (
	// settleDelay is the time after a change of the folder in which more changes are one.
	settleDelay = 500 * time.Millisecond
	// retryDelay is the time between attempts after a failure.
	retryDelay = time.Minute
	// relistInterval is the time after which what cannot be watched is listed again: a bucket, which others change too.
	relistInterval = time.Hour
)

// Config says what is listed.
type Config struct {
	Folder  string // of this server's snapshots; absolute
	Node    string // of this server
	Cluster string // hash of the cluster's authority
	// Bucket opens the place outside of the machine; nil if there is none.
	Bucket func(context.Context) (*s3.Bucket, error)
}

// List is the component that keeps the objects of this server's snapshots, and of those in S3, equal to the files.
type List struct {
	cfg    Config
	client dynamic.Interface
	wake   lifecycle.Wakeup // the server's own commands have changed something
	log    *slog.Logger
}

// New returns the component. client may define kinds, read nodes, and write Snapshots.
func New(cfg Config, client dynamic.Interface, log *slog.Logger) *List {
	return &List{cfg: cfg, client: client, wake: lifecycle.NewWakeup(), log: log}
}

// Name implements lifecycle.Component.
func (l *List) Name() string { return "snapshot objects" }

// Changed says that snapshots were taken, stored or removed. It never waits.
func (l *List) Changed() { l.wake.Wake() }

// Run implements lifecycle.Component. It calls ready at once: the cluster works without this list.
func (l *List) Run(ctx context.Context, ready func()) error {
	ready()
	var w folderWatch
	defer w.close()
	return l.follow(ctx, func() changes { return w.of(l.cfg.Folder) })
}

// changes are those of a folder. The zero changes are of a folder that does not exist.
type changes struct {
	events   <-chan fsnotify.Event
	failures <-chan error // changes may have been missed
	err      error        // the folder cannot be watched
}

// folderWatch watches a folder. It holds nothing before the folder exists, which is made with the first snapshot.
type folderWatch struct{ watcher *fsnotify.Watcher }

// of has the changes of the folder reported. It is called again whenever something has changed: the folder is another one if
// somebody has moved it away.
func (w *folderWatch) of(folder string) changes {
	if _, err := os.Stat(folder); err != nil {
		return changes{}
	}
	if w.watcher == nil {
		watcher, err := fsnotify.NewWatcher()
		if err != nil {
			return changes{err: err}
		}
		w.watcher = watcher
	}
	if err := w.watcher.Add(folder); err != nil {
		return changes{err: err}
	}
	return changes{events: w.watcher.Events, failures: w.watcher.Errors}
}

func (w *folderWatch) close() {
	if w.watcher != nil {
		_ = w.watcher.Close() // it never fails
	}
}

// follow lists the files whenever they have changed. watch has changes of the folder reported.
func (l *List) follow(ctx context.Context, watch func() changes) error {
	var folder changes
	due := time.NewTimer(0) // when the files are listed again
	defer due.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case event := <-folder.events:
			if !strings.HasPrefix(filepath.Base(event.Name), ".") { // files have another name while they are written
				due.Reset(settleDelay)
			}
		case <-folder.failures:
			due.Reset(settleDelay)
		case <-l.wake:
			due.Reset(settleDelay)
		case <-due.C:
			folder = watch()
			switch err := l.update(ctx); {
			case ctx.Err() != nil:
				return nil
			case err != nil:
				l.log.Warn("the objects of snapshots could not be brought up to date; trying again", "err", err, "again", retryDelay)
				due.Reset(retryDelay)
			case folder.err != nil:
				l.log.Warn("changes of the folder of snapshots are noticed late, since it cannot be watched", "err", folder.err, "within", relistInterval)
				due.Reset(relistInterval)
			case l.cfg.Bucket != nil:
				due.Reset(relistInterval)
			}
		}
	}
}

// update makes the objects equal to the files. A bucket that is away leaves its objects as they are.
func (l *List) update(ctx context.Context) error {
	want, err := l.files()
	if err != nil {
		return err
	}
	places := []Place{OnServer}
	var awayErr error
	if l.cfg.Bucket != nil {
		stored, err := l.stored(ctx)
		if err == nil {
			want, places = append(want, stored...), append(places, InS3)
		}
		awayErr = err
	}
	for _, place := range places {
		if err := l.write(ctx, place, want); err != nil {
			return errors.Join(err, awayErr)
		}
	}
	return awayErr
}

// files returns the snapshots on this machine.
func (l *List) files() (all []Status, err error) {
	found, err := archive.List(l.cfg.Folder)
	if err != nil {
		return nil, err
	}
	for _, f := range found {
		s := Status{
			Server: l.cfg.Node, Place: OnServer, File: filepath.Base(f.Path), Bytes: f.Size, Taken: timeText(f.Taken), Revision: f.Header.Revision,
			Kedge: f.Header.Kedge, Kubernetes: f.Header.Kubernetes, OpenedBy: f.Header.OpenedBy,
		}
		if f.Err != nil {
			s.Message = f.Err.Error()
		}
		all = append(all, s)
	}
	return all, nil
}

// stored returns the snapshots of this cluster in the bucket.
func (l *List) stored(ctx context.Context) (all []Status, err error) {
	b, err := l.cfg.Bucket(ctx)
	if err != nil {
		return nil, err
	}
	objects, err := b.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, o := range objects {
		if o.Meta[snapshots.MetaCluster] != l.cfg.Cluster {
			continue
		}
		s := Status{Server: o.Meta[snapshots.MetaNode], Place: InS3, File: o.Name, Bytes: o.Size, Taken: timeText(o.Modified)}
		if taken, err := time.Parse(time.RFC3339, o.Meta[snapshots.MetaTaken]); err == nil {
			s.Taken = timeText(taken)
		}
		// Without the metadata the object is listed all the same.
		s.Revision, _ = strconv.ParseInt(o.Meta[snapshots.MetaRevision], 10, 64)
		all = append(all, s)
	}
	return all, nil
}

// write makes the objects of a place equal to those of all that are of it.
func (l *List) write(ctx context.Context, place Place, all []Status) error {
	client := l.client.Resource(kind.Resource)
	want := map[string]Status{}
	for _, s := range all {
		if s.Place == place {
			want[objectName(s)] = s
		}
	}
	found, err := client.List(ctx, metav1.ListOptions{})
	if apierrors.IsNotFound(err) { // the kind
		if len(want) == 0 {
			return nil
		}
		if err := kind.Define(ctx, l.client); err != nil {
			return err
		}
		found, err = client.List(ctx, metav1.ListOptions{})
	}
	if err != nil {
		return err
	}
	owners, err := l.owners(ctx, place)
	if err != nil {
		return err
	}
	for i := range found.Items {
		o := &found.Items[i]
		old, ok := statusOf(o)
		if !ok || old.Place != place || place == OnServer && old.Server != l.cfg.Node {
			continue // another server's, or somebody's own
		}
		s, ok := want[o.GetName()]
		if delete(want, o.GetName()); !ok {
			err = client.Delete(ctx, o.GetName(), metav1.DeleteOptions{})
		} else if s != old || !reflect.DeepEqual(owners, o.GetOwnerReferences()) {
			err = l.replace(ctx, o, s, owners)
		}
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) { // another server was faster
			return err
		}
	}
	for name, s := range want {
		o := &unstructured.Unstructured{}
		o.SetGroupVersionKind(kind.Resource.GroupVersion().WithKind("Snapshot"))
		o.SetName(name)
		if err := set(o, s, owners); err != nil {
			return err
		}
		if _, err := client.Create(ctx, o, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			return err
		}
	}
	return nil
}

// replace writes an object that there is.
func (l *List) replace(ctx context.Context, o *unstructured.Unstructured, s Status, owners []metav1.OwnerReference) error {
	if err := set(o, s, owners); err != nil {
		return err
	}
	_, err := l.client.Resource(kind.Resource).Update(ctx, o, metav1.UpdateOptions{})
	return err
}

// owners returns what owns the objects of a place: those of a server's files are deleted with its node. A server without a node
// has none.
func (l *List) owners(ctx context.Context, place Place) ([]metav1.OwnerReference, error) {
	if place != OnServer {
		return nil, nil
	}
	node, err := l.client.Resource(corev1.SchemeGroupVersion.WithResource("nodes")).Get(ctx, l.cfg.Node, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node.GetName(), UID: node.GetUID()}}, nil
}

// set sets what an object says.
func set(o *unstructured.Unstructured, s Status, owners []metav1.OwnerReference) error {
	status, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&s)
	if err != nil {
		return err
	}
	o.Object["status"] = status
	o.SetOwnerReferences(owners)
	return nil
}

// statusOf returns what an object says; false if it is none of this package.
func statusOf(o *unstructured.Unstructured) (s Status, ok bool) {
	status, ok, err := unstructured.NestedMap(o.Object, "status")
	if !ok || err != nil {
		return s, false
	}
	return s, runtime.DefaultUnstructuredConverter.FromUnstructured(status, &s) == nil
}

// invalid is what the name of an object cannot have.
var invalid = regexp.MustCompile(`[^a-z0-9-]+`)

// objectName returns the name of the object of a snapshot: that of the file as far as it can be the name of an object, and a
// hash, since the same file can be on several servers and in S3.
func objectName(s Status) string {
	sum := sha256.Sum256([]byte(string(s.Place) + "\x00" + s.Server + "\x00" + s.File))
	base := strings.TrimSuffix(strings.TrimSuffix(s.File, archive.Suffix), archive.DatabaseSuffix)
	base = strings.Trim(invalid.ReplaceAllString(strings.ToLower(base), "-"), "-")
	return strings.TrimLeft(strings.Trim(base[:min(len(base), 200)], "-")+"-"+hex.EncodeToString(sum[:4]), "-")
}
