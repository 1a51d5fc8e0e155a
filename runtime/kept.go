package runtime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kedge/internal/atomicfile"
)

// Only containerd's database knows which blobs belong to an image, and the names of the image. Without that the
// blobs are useless if the database is damaged, so kedge also keeps the list of images in a file of a few
// kilobytes beside it.

// listedImage is an entry of the image list.
type listedImage struct {
	Target v1.Descriptor `json:"target"`
	Pinned bool          `json:"pinned,omitempty"`
}

// listFile is the file with this node's images by name.
func (c Config) listFile() string { return filepath.Join(c.root(), "images.json") }

// damagedDirs returns the folders of damaged databases, the oldest first.
func (c Config) damagedDirs() []string {
	found, _ := filepath.Glob(filepath.Join(c.DataDir, "containerd-damaged-*")) // the pattern is valid
	slices.Sort(found)
	return found
}

// keepBlobs moves the blobs of a damaged database, with a link to the image list, into the folder aside,
// for restoreImages.
func keepBlobs(c Config, aside string) error {
	blobs := filepath.Join(c.root(), "io.containerd.content.v1.content", "blobs")
	if err := os.Link(c.listFile(), filepath.Join(aside, filepath.Base(c.listFile()))); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Rename(blobs, filepath.Join(aside, "blobs")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return atomicfile.SyncDir(aside)
}

// restoreImages imports the images of damaged databases from their blobs, and logs the images that cannot be
// restored.
func (m *Images) restoreImages(ctx context.Context, client *containerd.Client) error {
	for _, aside := range m.cfg.damagedDirs() {
		blobs := filepath.Join(aside, "blobs")
		if _, err := os.Stat(blobs); err != nil {
			continue // there were no blobs, or the images were restored
		}
		if err := m.restoreFrom(ctx, client, aside); err != nil {
			return err
		}
		if err := errors.Join(os.RemoveAll(blobs), os.RemoveAll(filepath.Join(aside, "ingest"))); err != nil {
			return err
		}
	}
	return nil
}

func (m *Images) restoreFrom(ctx context.Context, client *containerd.Client, aside string) error {
	list, err := readList(filepath.Join(aside, filepath.Base(m.cfg.listFile())))
	if err != nil {
		m.log.Error("images that were pulled, or imported by command, are lost with a damaged database, and their names are unknown: pull them, or import their archives again with \"kedge images import\"",
			keyError, err)
		return nil
	}
	snapshotter, err := snapshotterOf(ctx, client)
	if err != nil {
		return err
	}
	byDigest := map[string][]string{}
	for name, held := range list {
		byDigest[held.Target.Digest.String()] = append(byDigest[held.Target.Digest.String()], name)
	}
	for _, d := range sortedKeys(byDigest) {
		names := byDigest[d]
		slices.Sort(names)
		if _, err := client.ImageService().Get(ctx, names[0]); err == nil {
			continue
		}
		err := m.restoreImage(ctx, client, snapshotter, aside, names, list[names[0]])
		if ctx.Err() != nil {
			return ctx.Err() // the next start continues
		}
		if err != nil {
			m.log.Error("an image was lost with a damaged database: pull it, or import its archive again with \"kedge images import\"", keyImage, names, keyError, err)
			continue
		}
		m.log.Info("restored an image of a damaged database from its blobs", keyImage, names)
	}
	return nil
}

// restoreImage imports an image from an archive made of its blobs, so that the import verifies every digest.
func (m *Images) restoreImage(ctx context.Context, client *containerd.Client, snapshotter layers, aside string, names []string, held listedImage) error {
	store, err := local.NewStore(aside)
	if err != nil {
		return err
	}
	// The import creates the name by digest from the tag.
	tags := slices.DeleteFunc(slices.Clone(names), func(name string) bool { return strings.Contains(name, "@") })
	r, w := io.Pipe()
	go func() {
		w.CloseWithError(archive.Export(ctx, store, w, archive.WithManifest(held.Target, tags...),
			archive.WithPlatform(platforms.Default()), archive.WithSkipMissing(store), archive.WithSkipDockerManifest()))
	}()
	defer r.Close()
	found, err := importArchive(ctx, client, snapshotter, held.Target.Digest.Encoded()[:12], r)
	if err != nil {
		return err
	}
	for _, name := range found {
		if !held.Pinned {
			img := images.Image{Name: name, Labels: map[string]string{labelPinned: ""}}
			if _, err := client.ImageService().Update(ctx, img, "labels."+labelPinned); err != nil {
				return err
			}
		}
		if err := waitForCRI(ctx, client, name); err != nil {
			return err
		}
	}
	return nil
}

func readList(name string) (map[string]listedImage, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	list := map[string]listedImage{}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return list, nil
}

// watchImages keeps the image list up to date until ctx ends.
func (m *Images) watchImages(ctx context.Context) {
	for ctx.Err() == nil {
		err := withClient(m.cfg.Socket(), func(client *containerd.Client) error {
			return m.updateList(namespaces.WithNamespace(ctx, criNamespace), client)
		})
		if ctx.Err() == nil {
			m.log.Debug("the image list cannot be updated; trying again", keyError, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(listRetryDelay):
		}
	}
}

const (
	// listRetryDelay is the delay before the next attempt when containerd does not answer.
	listRetryDelay = 5 * time.Second
	// listDelay is the delay between a change and the update of the list: changes come in bursts.
	listDelay = 2 * time.Second
)

// updateList writes the image list, and again after every change of an image.
func (m *Images) updateList(ctx context.Context, client *containerd.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changes, errs := client.Subscribe(ctx, `topic~="^/images/"`)
	for soon := time.After(0); ; {
		select {
		case err := <-errs:
			return err
		case <-changes:
			if soon == nil {
				soon = time.After(listDelay)
			}
		case <-soon:
			soon = nil
			if err := m.writeList(ctx, client); err != nil {
				return err
			}
		}
	}
}

func (m *Images) writeList(ctx context.Context, client *containerd.Client) error {
	all, err := client.ImageService().List(ctx)
	if err != nil {
		return err
	}
	list := map[string]listedImage{}
	for _, img := range all {
		if _, err := digest.Parse(img.Name); err == nil || strings.HasPrefix(img.Name, pauseRepository+":") {
			continue // a name that the CRI creates, or the pause image
		}
		list[img.Name] = listedImage{Target: img.Target, Pinned: img.Labels[labelPinned] == "pinned"}
	}
	data, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(m.cfg.listFile(), data, 0o600)
	return err
}
