package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// fakeNode makes a node without a machine, named <namespace>-<name>. Only pods that
// tolerate the taint kedge.test/fake go there, so that other tests do not see it.
func (n *node) fakeNode(t *testing.T, namespace, name string, labels map[string]string) string {
	t.Helper()
	ctx, full := context.Background(), namespace+"-"+name
	all := map[string]string{"kubernetes.io/hostname": full, "of": namespace}
	for k, v := range labels {
		all[k] = v
	}
	_, err := n.client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: full, Labels: all},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "kedge.test/fake", Value: namespace, Effect: corev1.TaintEffectNoSchedule}}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.client.CoreV1().Nodes().Delete(ctx, full, metav1.DeleteOptions{}) })
	status := fmt.Appendf(nil, `{"status":{"capacity":{"cpu":"4","memory":"4Gi","pods":"20"},"allocatable":{"cpu":"4","memory":"4Gi","pods":"20"},
		"conditions":[{"type":"Ready","status":"True","reason":"Fake","lastHeartbeatTime":%q}]}}`, time.Now().UTC().Format(time.RFC3339))
	if _, err := n.client.CoreV1().Nodes().Patch(ctx, full, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	// The admission taints new nodes as not ready; a controller takes that away.
	eventually(t, 30*time.Second, func() error {
		now, err := n.client.CoreV1().Nodes().Get(ctx, full, metav1.GetOptions{})
		if err != nil || len(now.Spec.Taints) != 1 {
			return fmt.Errorf("the node has taints %+v: %v", now.Spec.Taints, err)
		}
		return nil
	})
	return full
}
