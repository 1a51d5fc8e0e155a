package runtime

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	goruntime "runtime"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// criNamespace is containerd's namespace for all objects of the CRI.
	criNamespace = "k8s.io"

	pauseRepository = "kedge.local/pause"

	labelManaged = "io.cri-containerd.image"
	labelPinned  = "io.cri-containerd.pinned"
)

// importedLabels mark an image as managed by the CRI and protect it from the kubelet's garbage collection: an
// imported image may not be in any registry.
func importedLabels() map[string]string {
	return map[string]string{labelManaged: "managed", labelPinned: "pinned"}
}

// pauseImage is the image of the process that holds a pod's namespaces, built at run time from the program in
// the payload.
type pauseImage struct {
	name     string
	manifest v1.Descriptor
	blobs    []pauseBlob // children before parents
}

type pauseBlob struct {
	desc v1.Descriptor
	data []byte
	refs []digest.Digest // blobs that the garbage collector keeps because of this blob
}

// newPauseImage builds the image from a program. The same program always gives the same name.
func newPauseImage(program []byte) (*pauseImage, error) {
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	err := errors.Join(
		tw.WriteHeader(&tar.Header{Name: "pause", Mode: 0o755, Size: int64(len(program)), Typeflag: tar.TypeReg}),
		func() error { _, err := tw.Write(program); return err }(),
		tw.Close(),
	)
	if err != nil {
		return nil, err
	}
	img := &pauseImage{}
	layerDesc := img.add(v1.MediaTypeImageLayer, layer.Bytes())

	config, err := json.Marshal(v1.Image{
		Platform: v1.Platform{Architecture: goruntime.GOARCH, OS: "linux"},
		Config:   v1.ImageConfig{User: "65535:65535", Entrypoint: []string{"/pause"}},
		RootFS:   v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{layerDesc.Digest}},
	})
	if err != nil {
		return nil, err
	}
	configDesc := img.add(v1.MediaTypeImageConfig, config)

	manifest, err := json.Marshal(v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: v1.MediaTypeImageManifest,
		Config:    configDesc,
		Layers:    []v1.Descriptor{layerDesc},
	})
	if err != nil {
		return nil, err
	}
	img.manifest = img.add(v1.MediaTypeImageManifest, manifest, configDesc.Digest, layerDesc.Digest)
	img.name = pauseRepository + ":" + img.manifest.Digest.Encoded()[:12]
	return img, nil
}

func (p *pauseImage) add(mediaType string, data []byte, refs ...digest.Digest) v1.Descriptor {
	desc := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	p.blobs = append(p.blobs, pauseBlob{desc: desc, data: data, refs: refs})
	return desc
}

// ensure creates the image, unpacked and pinned, and removes the pause images of other versions. Running
// sandboxes keep their layers.
func (p *pauseImage) ensure(ctx context.Context, client *containerd.Client, snapshotter string) error {
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer done(ctx)

	for _, b := range p.blobs {
		labels := map[string]string{}
		for i, ref := range b.refs {
			labels[fmt.Sprintf("containerd.io/gc.ref.content.%d", i)] = ref.String()
		}
		err := content.WriteBlob(ctx, client.ContentStore(), "kedge-pause-"+b.desc.Digest.Encoded(), bytes.NewReader(b.data), b.desc, content.WithLabels(labels))
		if err != nil {
			return fmt.Errorf("store pause image: %w", err)
		}
	}
	img := images.Image{Name: p.name, Target: p.manifest, Labels: importedLabels()}
	if err := putImage(ctx, client, img); err != nil {
		return fmt.Errorf("name pause image: %w", err)
	}
	unpacked := containerd.NewImageWithPlatform(client, img, platforms.Default())
	if err := unpacked.Unpack(ctx, snapshotter); err != nil {
		return fmt.Errorf("unpack pause image: %w", err)
	}

	known, err := client.ImageService().List(ctx)
	if err != nil {
		return err
	}
	for _, other := range known {
		if strings.HasPrefix(other.Name, pauseRepository+":") && other.Name != p.name {
			if err := client.ImageService().Delete(ctx, other.Name); err != nil && !errdefs.IsNotFound(err) {
				return err
			}
		}
	}
	return nil
}

// putImage creates an image or updates its target and labels.
func putImage(ctx context.Context, client *containerd.Client, img images.Image) error {
	_, err := client.ImageService().Update(ctx, img, "target", "labels")
	if errdefs.IsNotFound(err) {
		_, err = client.ImageService().Create(ctx, img)
	}
	return err
}
