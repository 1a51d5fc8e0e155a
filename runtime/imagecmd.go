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
	"github.com/containerd/platforms"
	distribution "github.com/distribution/reference"
	"github.com/docker/go-units"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The functions in this file are the commands under "kedge images". They talk to a
// running node through its socket, and see what its pods see.

// ImportImages imports archives as the images folder does, once: they are pinned,
// and not imported again after the record of images was lost. "-" is standard input.
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

func importNamed(ctx context.Context, client *containerd.Client, snapshotter, file string) ([]string, error) {
	if file == "-" {
		return importArchive(ctx, client, snapshotter, "stdin", os.Stdin)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return importArchive(ctx, client, snapshotter, filepath.Base(file), f)
}

// ExportImages writes images, as this machine's architecture needs them, to one
// archive that the images folder of another node and docker load both take.
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

// ListImages writes a table of the node's images, one line per name.
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

// RemoveImages removes images under all their names. One that came from the images
// folder comes back at the next start.
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

// PullImages pulls images as the kubelet would, through the registries that are
// configured and with their credentials.
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
	return withClient(socket, func(client *containerd.Client) error {
		return f(namespaces.WithNamespace(ctx, criNamespace), client)
	})
}

// snapshotterOf asks a running containerd where it keeps layers.
func snapshotterOf(ctx context.Context, client *containerd.Client) (string, error) {
	info, err := cri.NewImageServiceClient(connection(client)).ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	if err != nil {
		return "", err
	}
	for _, fs := range info.ImageFilesystems {
		if name, ok := strings.CutPrefix(filepath.Base(fs.GetFsId().GetMountpoint()), "io.containerd.snapshotter.v1."); ok {
			return name, nil
		}
	}
	return "", errors.New("containerd does not say where it keeps layers")
}
