package runtime

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	distribution "github.com/distribution/reference"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// The functions in this file read images without a node, for bundles.

// newBlobs returns a store of blobs in a folder, as an OCI layout has them.
func newBlobs(dir string) (content.Store, error) {
	// containerd's store logs that a file system lacks fsverity, which is of no interest for a temporary folder.
	before := log.GetLevel()
	if err := log.SetLevel("error"); err != nil {
		return nil, err
	}
	store, err := local.NewStore(dir)
	return store, errors.Join(err, log.SetLevel(before.String()))
}

// ReadArchive puts the blobs of an archive, of the kinds that the images folder accepts, into a folder, as an OCI layout has
// them, and returns the names and descriptors of its images. file is the name of the archive in messages.
func ReadArchive(ctx context.Context, file string, r io.Reader, dir string) ([]images.Image, error) {
	store, err := newBlobs(dir)
	if err != nil {
		return nil, err
	}
	b := bufio.NewReaderSize(r, archiveBuffer)
	plain, err := decompress(file, b)
	if err != nil {
		return nil, readError(file, err)
	}
	if plain != nil {
		defer plain.Close()
		b = bufio.NewReaderSize(plain, archiveBuffer)
	}
	var found []images.Image
	for more := true; more; { // several archives may be joined
		index, err := archive.ImportIndex(ctx, store, b)
		if err != nil {
			return nil, readError(file, err)
		}
		if more, err = skipPadding(b); err != nil {
			return nil, readError(file, err)
		}
		data, err := content.ReadBlob(ctx, store, index)
		if err != nil {
			return nil, readError(file, err)
		}
		var list v1.Index
		if err := json.Unmarshal(data, &list); err != nil {
			return nil, readError(file, err)
		}
		for _, m := range list.Manifests {
			if _, ok := m.Annotations[images.AnnotationManifestSubject]; ok || m.Annotations["vnd.docker.reference.type"] != "" {
				continue // a signature or attestation, not an image
			}
			name, err := imageName(file, m)
			if err != nil {
				return nil, err
			}
			found = append(found, images.Image{Name: name.String(), Target: m})
		}
	}
	if len(found) == 0 {
		return nil, &archiveError{file, "contains no image"}
	}
	return found, nil
}

// FetchImage pulls an image for some architectures into a folder, from the registries and with the credentials of a
// registries.yaml.
func FetchImage(ctx context.Context, registriesFile, text string, architectures []string, dir string) (img images.Image, err error) {
	store, err := newBlobs(dir)
	if err != nil {
		return img, err
	}
	name, err := distribution.ParseDockerRef(text)
	if err != nil {
		return img, fmt.Errorf("image name %q: %w", text, err)
	}
	registries, err := LoadRegistries(registriesFile)
	if err != nil {
		return img, err
	}
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	ctx = log.WithLogger(ctx, logrus.NewEntry(quiet))
	resolver, done, err := newResolver(ctx, registries)
	if err != nil {
		return img, err
	}
	defer done()
	var wanted []v1.Platform
	for _, a := range architectures {
		wanted = append(wanted, platforms.Normalize(v1.Platform{OS: "linux", Architecture: a}))
	}
	if err := fetch(ctx, resolver, name.String(), platforms.Any(wanted...), store, &img); err != nil {
		return img, fmt.Errorf("pull %s: %w", name, err)
	}
	return img, nil
}

func fetch(ctx context.Context, resolver remotes.Resolver, name string, matcher platforms.Matcher, store content.Store, img *images.Image) error {
	full, desc, err := resolver.Resolve(ctx, name)
	if err != nil {
		return err
	}
	fetcher, err := resolver.Fetcher(ctx, full)
	if err != nil {
		return err
	}
	*img = images.Image{Name: name, Target: desc}
	children := images.FilterPlatforms(images.ChildrenHandler(store), matcher)
	// One part after the other: the memory that a pull needs does not grow with the image.
	return images.Walk(ctx, images.Handlers(remotes.FetchHandler(store, fetcher), children), desc)
}

// newResolver returns a client of registries as containerd has it in a node. done ends it.
func newResolver(ctx context.Context, registries Registries) (_ remotes.Resolver, done func(), err error) {
	dir, err := os.MkdirTemp("", "kedge-registries-*")
	if err != nil {
		return nil, nil, err
	}
	rw, err := startRewriter(registries, slog.New(slog.DiscardHandler))
	if err != nil {
		os.RemoveAll(dir)
		return nil, nil, fmt.Errorf("serve registry rewrites: %w", err)
	}
	var clients []*http.Client
	done = func() {
		for _, c := range clients {
			c.CloseIdleConnections()
		}
		rw.close()
		os.RemoveAll(dir)
	}
	if err := writeHosts(dir, registries, false, rw.address); err != nil {
		done()
		return nil, nil, err
	}
	hosts := config.ConfigureHosts(ctx, config.HostOptions{
		HostDir: config.HostDirFromRoot(dir),
		Credentials: func(host string) (string, string, error) {
			auth := registries.configFor(host).Auth
			if auth == nil {
				return "", "", nil
			}
			return auth.credentials()
		},
		UpdateClient: func(c *http.Client) error { clients = append(clients, c); return nil },
	})
	return docker.NewResolver(docker.ResolverOptions{Hosts: hosts}), done, nil
}
