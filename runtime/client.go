package runtime

import (
	"context"
	"errors"
	"fmt"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// withClient calls f with a client of the containerd at socket.
func withClient(socket string, f func(*containerd.Client) error) error {
	client, err := containerd.New(socket, containerd.WithDefaultNamespace(criNamespace), containerd.WithTimeout(10*time.Second))
	if err != nil {
		return fmt.Errorf("reach containerd at %s: %w", socket, err)
	}
	return errors.Join(f(client), client.Close())
}

// connection returns the gRPC connection of a client made by withClient. The CRI is served on the same socket.
func connection(client *containerd.Client) grpc.ClientConnInterface {
	return client.Conn().(grpc.ClientConnInterface)
}

// waitForCRI waits until the CRI knows an image. The CRI learns of images that other clients create from
// events, asynchronously.
func waitForCRI(ctx context.Context, client *containerd.Client, name string) error {
	images := cri.NewImageServiceClient(connection(client))
	err := poll(ctx, 10*time.Second, func() (bool, error) {
		status, err := images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
		return err == nil && status.Image != nil, err
	})
	if err != nil {
		return fmt.Errorf("wait for the CRI to see image %s: %w", name, err)
	}
	return nil
}
