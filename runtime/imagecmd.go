package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	distribution "github.com/distribution/reference"
	"github.com/docker/go-units"
	"github.com/sirupsen/logrus"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The functions in this file implement the commands under "kedge images". They connect to the socket of a
// running node and see the same images as its pods.

// ImportImages imports archives as the images folder does, but once: the images are pinned, and are not
// imported again if containerd's database is lost. "-" is standard input. It writes the image names to w.
func ImportImages(ctx context.Context, socket string, w io.Writer, files []string) error {
	return withImages(ctx, socket, func(ctx context.Context, client *containerd.Client) error {
		snapshotter, err := snapshotterOf(ctx, client)
		if err != nil {
			return err
		}
		var errs []error
		for _, file := range files {
			names, err := importNamed(ctx, client, snapshotter, file)
			for _, n := range names {
				fmt.Fprintln(w, n)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
}

func importNamed(ctx context.Context, client *containerd.Client, snapshotter layers, file string) ([]string, error) {
	if file == "-" {
		return importArchive(ctx, client, snapshotter, "stdin", os.Stdin)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := snapshotter.fits(filepath.Base(file), info.Size()); err != nil {
		return nil, err
	}
	return importArchive(ctx, client, snapshotter, filepath.Base(file), f)
}

// ExportImages writes images for this machine's architecture to an archive that the images folder of another
// node and docker load can read.
func ExportImages(ctx context.Context, socket string, to io.Writer, names []string) error {
	return withImages(ctx, socket, func(ctx context.Context, client *containerd.Client) error {
		options := []archive.ExportOpt{archive.WithPlatform(platforms.Default()), archive.WithSkipNonDistributableBlobs()}
		for _, text := range names {
			name, err := distribution.ParseDockerRef(text)
			if err != nil {
				return fmt.Errorf("image name %q: %w", text, err)
			}
			options = append(options, archive.WithImage(client.ImageService(), name.String()))
		}
		return client.Export(ctx, to, options...)
	})
}

// ListImages writes a table of the node's images, with one line per name.
func ListImages(ctx context.Context, socket string, w io.Writer) error {
	return withImages(ctx, socket, func(ctx context.Context, client *containerd.Client) error {
		list, err := cri.NewImageServiceClient(connection(client)).ListImages(ctx, &cri.ListImagesRequest{})
		if err != nil {
			return err
		}
		var lines []string
		for _, img := range list.Images {
			names := img.RepoTags
			if len(names) == 0 {
				names = img.RepoDigests
			}
			if len(names) == 0 {
				names = []string{"<none>"}
			}
			pinned := ""
			if img.Pinned {
				pinned = "pinned"
			}
			id := strings.TrimPrefix(img.Id, "sha256:")
			for _, n := range names {
				lines = append(lines, fmt.Sprintf("%s\t%s\t%s\t%s", n, id[:min(12, len(id))], units.HumanSize(float64(img.Size)), pinned))
			}
		}
		slices.Sort(lines)
		tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintln(tw, "IMAGE\tID\tSIZE\t")
		for _, l := range lines {
			fmt.Fprintln(tw, l)
		}
		return tw.Flush()
	})
}

// RemoveImages removes images with all their names. An image from the images folder is imported again at the
// next start.
func RemoveImages(ctx context.Context, socket string, w io.Writer, names []string) error {
	return withImages(ctx, socket, func(ctx context.Context, client *containerd.Client) error {
		images := cri.NewImageServiceClient(connection(client))
		var errs []error
		for _, name := range names {
			spec := &cri.ImageSpec{Image: name}
			status, err := images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec})
			if err == nil && status.Image == nil {
				err = errors.New("no such image")
			}
			if err == nil {
				_, err = images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: spec})
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("remove %s: %w", name, err))
				continue
			}
			fmt.Fprintln(w, "removed", name)
		}
		return errors.Join(errs...)
	})
}

// PullImages pulls images like the kubelet, through the configured registries with their credentials.
func PullImages(ctx context.Context, socket string, w io.Writer, names []string) error {
	return withImages(ctx, socket, func(ctx context.Context, client *containerd.Client) error {
		images := cri.NewImageServiceClient(connection(client))
		var errs []error
		for _, name := range names {
			pulled, err := images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: name}})
			if err != nil {
				errs = append(errs, fmt.Errorf("pull %s: %w", name, err))
				continue
			}
			fmt.Fprintln(w, name, pulled.ImageRef)
		}
		return errors.Join(errs...)
	})
}

func withImages(ctx context.Context, socket string, f func(context.Context, *containerd.Client) error) error {
	// containerd's client logs messages beside the errors that it returns; users need only the errors.
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	ctx = log.WithLogger(ctx, logrus.NewEntry(quiet))
	return withClient(socket, func(client *containerd.Client) error {
		return f(namespaces.WithNamespace(ctx, criNamespace), client)
	})
}

// layers describes where a running containerd stores layers.
type layers struct {
	name string // name of the snapshotter
	dir  string // folder of the snapshotter
}

// snapshotterOf requests the snapshotter of a running containerd.
func snapshotterOf(ctx context.Context, client *containerd.Client) (layers, error) {
	info, err := cri.NewImageServiceClient(connection(client)).ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	if err != nil {
		return layers{}, err
	}
	for _, fs := range info.ImageFilesystems {
		dir := fs.GetFsId().GetMountpoint()
		if name, ok := strings.CutPrefix(filepath.Base(dir), "io.containerd.snapshotter.v1."); ok {
			return layers{name, dir}, nil
		}
	}
	return layers{}, errors.New("containerd reported no folder for layers")
}
