package workloads

import (
	"context"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestNobodyElects looks for leases of other kinds than the kubelets': whoever renews one
// writes to the store every few seconds, also on a server that is idle and alone.
func TestNobodyElects(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	// The node's own comes last: once it is there, those of the control plane would be.
	harness.Eventually(t, 30*time.Second, func() error {
		_, err := n.Client.CoordinationV1().Leases("kube-node-lease").Get(context.Background(), n.Name, metav1.GetOptions{})
		return err
	})
	leases, err := n.Client.CoordinationV1().Leases("kube-system").List(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range leases.Items {
		t.Errorf("there is a lease %s", l.Name)
	}
}
