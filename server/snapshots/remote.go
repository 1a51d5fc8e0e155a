package snapshots

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/s3"
)

// Remote says where snapshots are stored outside of the machine.
type Remote struct {
	S3     s3.Config
	Secret string // name of a Secret of kube-system that has the configuration, instead of S3
}

// Keys of the metadata of a snapshot in S3.
const (
	MetaNode     = "kedge-node"
	MetaTaken    = "kedge-taken"
	MetaRevision = "kedge-revision"
	MetaCluster  = "kedge-cluster"
)

// Bucket opens the place outside of the machine, to list what is there. [Config.Remote] must be set.
func (s *Saver) Bucket(ctx context.Context) (*s3.Bucket, error) {
	return s.bucket(ctx, archive.Scheduled)
}

// bucket opens the place outside of the machine. Uploads of names with another prefix are left alone: they may be those of other
// servers.
func (s *Saver) bucket(ctx context.Context, prefix string) (*s3.Bucket, error) {
	c := s.cfg.Remote.S3
	if name := s.cfg.Remote.Secret; name != "" {
		secret, err := s.keys.secrets.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, fmt.Errorf("read the Secret with the settings of S3: %w", err)
		}
		if c, err = s3.FromSecret(secret.Data); err != nil {
			return nil, fmt.Errorf("the Secret %s of kube-system: %w", name, err)
		}
	}
	c.NamePrefix = prefix + "-" + s.cfg.Node + "-"
	return s3.Open(ctx, c)
}

// ErrNotStored is wrapped when a snapshot was saved on this machine, and could not be stored outside of it.
var ErrNotStored = errors.New("the snapshot is on this machine only")

// store stores a snapshot of a server outside of the machine, if there is such a place, and removes old ones of the schedule
// there.
func (s *Saver) store(ctx context.Context, path, prefix string) error {
	if s.cfg.Remote == nil {
		return nil
	}
	if err := s.upload(ctx, path, prefix); err != nil {
		return fmt.Errorf("%w, in %s: %w", ErrNotStored, path, err)
	}
	s.changed()
	return nil
}

func (s *Saver) upload(ctx context.Context, path, prefix string) error {
	b, err := s.bucket(ctx, prefix)
	if err != nil {
		return err
	}
	h, err := archive.HeaderOf(path)
	if err != nil {
		return err
	}
	name := filepath.Base(path)
	err = b.Upload(ctx, path, name, map[string]string{
		MetaNode: h.Node, MetaTaken: h.Taken.Format(time.RFC3339), MetaRevision: strconv.FormatInt(h.Revision, 10), MetaCluster: h.Cluster,
	})
	if err != nil {
		return err
	}
	s.log.Info("snapshot of the cluster stored in S3", "name", name)
	if prefix != archive.Scheduled {
		return nil
	}
	_, err = PruneRemote(ctx, b, archive.Scheduled, s.cfg.Node, s.cfg.Retention)
	return err
}

// PruneRemote is [archive.Prune] for a bucket.
func PruneRemote(ctx context.Context, b *s3.Bucket, prefix, node string, keep int) (removed []string, err error) {
	all, err := b.List(ctx)
	if err != nil {
		return nil, err
	}
	nodes := map[string]string{}
	for _, o := range all {
		nodes[o.Name] = o.Meta[MetaNode]
	}
	for _, name := range archive.Old(nodes, prefix, node, keep) {
		if rmErr := b.Remove(ctx, name); rmErr != nil {
			err = errors.Join(err, rmErr)
			continue
		}
		removed = append(removed, name)
	}
	return removed, err
}
