package throwaway

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"kedge/throwaway/machine"
)

// Node returns the machine of a node.
func (c *Cluster) Node(name string) (*machine.Machine, error) {
	if m := c.site.Machine(name); m != nil {
		return m, nil
	}
	var names []string
	for _, m := range c.site.Machines() {
		names = append(names, m.Name())
	}
	return nil, fmt.Errorf("cluster %s has no node %s; it has %s", c.record.Name, name, strings.Join(names, ", "))
}

func (c *Cluster) client() (kubernetes.Interface, error) {
	config, err := c.Config()
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(config)
}

// change reloads the record and runs f, both with the cluster's lock.
func (c *Cluster) change(f func() error) error {
	release, err := c.root.lock(clusterLock(c.record.Name))
	if err != nil {
		return err
	}
	defer release()
	now, err := c.root.read(c.record.Name)
	if err != nil {
		return err
	}
	c.record = now.record
	return f()
}

// AddNode makes one more node and returns its name when it is Ready.
func (c *Cluster) AddNode(ctx context.Context, cfg Config, role Role, say func(string)) (name string, err error) {
	cfg.Images = c.record.Images
	template, err := c.root.template(ctx, cfg, say)
	if err != nil {
		return "", err
	}
	var m *machine.Machine
	err = c.change(func() error {
		if m, err = c.addMachine(role); err != nil {
			return err
		}
		return errors.Join(c.save(), c.prepareAndStart(m, role, template))
	})
	if err != nil {
		return "", err
	}
	if err := c.waitNode(ctx, m); err != nil {
		return "", fmt.Errorf("%w%s", err, c.logTails())
	}
	return m.Name(), nil
}

// waitNode waits until one node is Ready.
func (c *Cluster) waitNode(ctx context.Context, m *machine.Machine) error {
	client, err := c.client()
	if err != nil {
		return err
	}
	for {
		ready, err := readyNodes(ctx, client)
		for _, name := range ready {
			if name == m.Name() {
				return nil
			}
		}
		if st, gone := m.Kedge(); gone != nil || !st.Running {
			return errors.Join(gone, fmt.Errorf("kedge on %s has ended", m.Name()))
		}
		if stopped := pause(ctx, pollInterval); stopped != nil {
			return errors.Join(fmt.Errorf("%s is not Ready: %w", m.Name(), stopped), err)
		}
	}
}

// RemoveNode removes a node from the cluster, and its machine.
func (c *Cluster) RemoveNode(ctx context.Context, name string) error {
	return c.change(func() error {
		m, err := c.Node(name)
		if err != nil {
			return err
		}
		if m == c.site.Machines()[0] {
			return fmt.Errorf("%s is the server that the other nodes have joined; remove the whole cluster with \"kedge down %s\"", name, c.record.Name)
		}
		client, err := c.client()
		if err != nil {
			return err
		}
		if err := client.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete the node %s from the cluster: %w", name, err)
		}
		return m.Remove()
	})
}

// StopNode switches a node off, as pulling its plug does.
func (c *Cluster) StopNode(name string) error {
	return c.change(func() error {
		m, err := c.Node(name)
		if err != nil {
			return err
		}
		return m.PowerOff()
	})
}

// StartNode switches a node on again and returns when it is Ready.
func (c *Cluster) StartNode(ctx context.Context, name string) error {
	var m *machine.Machine
	err := c.change(func() (err error) {
		if m, err = c.Node(name); err != nil {
			return err
		}
		if err := m.PowerOn(); err != nil {
			return err
		}
		if st, err := m.Kedge(); err != nil || st.Running {
			return err
		}
		return m.StartKedge(string(roleOf(name)))
	})
	if err != nil {
		return err
	}
	// The API may still show the node's last status.
	if err := untilAllReady(ctx, m); err != nil {
		return fmt.Errorf("%s is not ready: %w", name, err)
	}
	return c.waitNode(ctx, m)
}

// LoadImages imports archives on every node that is on. Nodes that are off, and new nodes,
// import them when they start.
func (c *Cluster) LoadImages(ctx context.Context, archives []string) error {
	return c.change(func() error {
		for _, archive := range archives {
			abs, err := filepath.Abs(archive)
			if err != nil {
				return err
			}
			if st, err := os.Stat(abs); err != nil {
				return fmt.Errorf("image archive: %w", err)
			} else if !st.Mode().IsRegular() {
				return fmt.Errorf("image archive %s is not a file", archive)
			}
			if !slices.Contains(c.record.Images, abs) {
				c.record.Images = append(c.record.Images, abs)
			}
			for _, m := range c.site.Machines() {
				if err := addImage(abs, m.Disk(dataDir)); err != nil {
					return err
				}
				if !m.On() {
					continue // it imports the folder's archives when it starts
				}
				if out, err := m.Output(ctx, "kedge", "images", "import", filepath.Join(dataDir, "images", filepath.Base(abs))); err != nil {
					return fmt.Errorf("%w: %s", err, strings.TrimSpace(out))
				}
			}
		}
		return c.save()
	})
}
