package throwaway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// clusterDNS is the address of the cluster's DNS, at which every node answers.
const clusterDNS = "10.43.0.10:53"

// pollInterval is the interval at which conditions are polled.
const pollInterval = 50 * time.Millisecond

// waitReady returns when all nodes are Ready and every machine's DNS answers. It reports both
// with the time since begin.
func (c *Cluster) waitReady(ctx context.Context, nodes int, begin time.Time, say func(string)) error {
	if err := c.waitKubeconfig(ctx); err != nil {
		return err
	}
	config, err := c.Config()
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	if err := c.waitNodes(ctx, client, nodes); err != nil {
		return err
	}
	say(fmt.Sprintf("all nodes are Ready (%s)", since(begin)))
	if err := c.waitDNS(ctx); err != nil {
		return err
	}
	say(fmt.Sprintf("DNS answers (%s)", since(begin)))
	return nil
}

func since(begin time.Time) string { return time.Since(begin).Round(10 * time.Millisecond).String() }

// waitKubeconfig waits until the first server has written its kubeconfig.
func (c *Cluster) waitKubeconfig(ctx context.Context) error {
	first := c.site.Machines()[0]
	for {
		if _, err := os.Stat(first.Disk(adminKubeconfig)); err == nil {
			if c.writeKubeconfig() == nil {
				return nil
			}
		}
		if err := c.allRun(); err != nil {
			return err
		}
		if err := pause(ctx, pollInterval); err != nil {
			return err
		}
	}
}

// allRun returns an error that names a node whose kedge has ended.
func (c *Cluster) allRun() error {
	for _, m := range c.site.Machines() {
		st, err := m.Kedge()
		if err != nil {
			return err
		}
		if !st.Running {
			return fmt.Errorf("kedge on %s has ended", m.Name())
		}
	}
	return nil
}

func (c *Cluster) waitNodes(ctx context.Context, client kubernetes.Interface, want int) error {
	for {
		ready, err := readyNodes(ctx, client)
		if err == nil && len(ready) >= want {
			return nil
		}
		if err := c.allRun(); err != nil {
			return err
		}
		if err := pause(ctx, pollInterval); err != nil {
			return fmt.Errorf("%d of %d nodes are Ready: %w", len(ready), want, err)
		}
	}
}

func readyNodes(ctx context.Context, client kubernetes.Interface) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	list, err := client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	var ready []string
	for _, n := range list.Items {
		if slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		}) {
			ready = append(ready, n.Name)
		}
	}
	return ready, nil
}

// waitDNS waits until every machine resolves the name of the service kubernetes.
func (c *Cluster) waitDNS(ctx context.Context) error {
	for _, m := range c.site.Machines() {
		host, err := m.Host()
		if err != nil {
			return err
		}
		resolver := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return host.Dial(ctx, "udp", clusterDNS)
		}}
		for {
			once, cancel := context.WithTimeout(ctx, time.Second)
			_, err := resolver.LookupHost(once, "kubernetes.default.svc.cluster.local.")
			cancel()
			if err == nil {
				break
			}
			if stopped := pause(ctx, pollInterval); stopped != nil {
				return fmt.Errorf("the DNS of %s does not answer: %w", m.Name(), errors.Join(stopped, err))
			}
		}
	}
	return nil
}
