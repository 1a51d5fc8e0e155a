package storage

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/control"
	"kedge/scripts/e2e/harness"
)

// The snapshot is of the objects in testdata/old.yaml of package importk3s, whose test writes it, and this is its server token.
const (
	k3sSnapshot = "server/importk3s/testdata/k3s-snapshot.zip"
	k3sToken    = "K10aaaabbbb::server:correct-horse"
	k3sVolume   = "/tmp/kedge-imported-volume"
)

// TestImportFromK3s imports a snapshot of k3s's etcd into a new cluster: its Deployment runs with its Secret and its volume.
func TestImportFromK3s(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	// The data of the old volume, copied to the new node.
	t.Cleanup(func() { os.RemoveAll(k3sVolume) })
	if err := os.MkdirAll(k3sVolume, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(k3sVolume, "word"), []byte("from-k3s\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	before := n.SecretKeys(t)
	token := filepath.Join(n.Dir, "k3s-token")
	if err := os.WriteFile(token, []byte(k3sToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	from := "--snapshot=" + harness.InProject(k3sSnapshot)
	run := func(more ...string) string {
		t.Helper()
		args := append([]string{"import", "k3s", "--kubeconfig=" + n.Kubeconfig}, more...)
		out, err := n.RunKedge(args...)
		if err != nil {
			t.Fatalf("kedge %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return out
	}
	if out, err := n.RunKedge("import", "k3s", from, "--kubeconfig="+n.Kubeconfig, "--token=wrong"); err == nil || !strings.Contains(out, "the token is not the server token of this snapshot's cluster") {
		t.Errorf("with a wrong token: %v\n%s", err, out)
	}
	if out := run(from, "--token-file="+token, "--dry-run"); !strings.Contains(out, "Nothing was changed") {
		t.Errorf("a dry run says\n%s", out)
	}
	if out, err := n.TryKubectl(nil, "get", "namespace", "shop"); err == nil {
		t.Errorf("a dry run has created a namespace:\n%s", out)
	}
	out := run(from, "--token-file="+token)
	t.Logf("the import says\n%s", out)
	checkImported(t, n, before)
	changesNothing(t, run(from, "--token-file="+token))

	// The store of this cluster, which a real API server has written, says what is there already.
	var saved control.SavedSnapshot
	if err := control.Post(t.Context(), n.RunDir(), control.SaveSnapshotPath, url.Values{"name": {"own.db"}}, &saved); err != nil {
		t.Fatal(err)
	}
	own := run("--snapshot="+filepath.Join(n.DataDir(), "snapshots/own.db"), "--encryption-config="+filepath.Join(n.DataDir(), "server/encryption-config.yaml"), "--dry-run")
	changesNothing(t, own)
	for _, part := range []string{"unchanged", "shop/db", "orders.shop.example.org", "shop/first", "shop/web", "pvc-1"} {
		if !strings.Contains(own, part) {
			t.Errorf("the snapshot of the new cluster has no %s:\n%s", part, own)
		}
	}
}

// changesNothing fails the test if an import has changed something, or would.
func changesNothing(t *testing.T, out string) {
	t.Helper()
	for _, outcome := range []string{"created", "completed", "updated", "differs", "failed"} {
		if strings.Contains(out, "\n"+outcome+" ") {
			t.Errorf("the import has objects that are %q:\n%s", outcome, out)
		}
	}
}

// checkImported looks at the cluster after the import. before is how many Secrets each key had encrypted.
func checkImported(t *testing.T, n *harness.Node, before map[string]int) {
	t.Helper()
	ctx := context.Background()
	harness.Eventually(t, harness.Patient(time.Minute), func() error { return n.LogsHave("shop", "deployment/web", "from-k3s") })
	secret, err := n.Client.CoreV1().Secrets("shop").Get(ctx, "db", metav1.GetOptions{})
	if err != nil || string(secret.Data["password"]) != "let-me-in" {
		t.Errorf("the Secret: %v, %q", err, secret.Data)
	}
	after := n.SecretKeys(t)
	if after["plain"] > before["plain"] || after["key1"] < before["key1"]+2 {
		t.Errorf("Secrets by key were %v, and are %v", before, after)
	}
	for name, of := range map[string]string{"data": "pvc-1", "data-db-0": "pvc-2"} {
		claim, err := n.Client.CoreV1().PersistentVolumeClaims("shop").Get(ctx, name, metav1.GetOptions{})
		if err != nil || claim.Status.Phase != corev1.ClaimBound || claim.Spec.VolumeName != of {
			t.Errorf("the claim %s: %v, %v", name, err, claim.Status)
			continue
		}
		volume, err := n.Client.CoreV1().PersistentVolumes().Get(ctx, of, metav1.GetOptions{})
		if err != nil || volume.Status.Phase != corev1.VolumeBound || volume.Spec.ClaimRef.UID != claim.UID {
			t.Errorf("the volume %s: %v, %v", of, err, volume)
		}
	}
	if total := n.Kubectl(t, "get", "order", "-n", "shop", "first", "-o", "jsonpath={.spec.total}"); total != "3" {
		t.Errorf("the order has the total %q", total)
	}
	owner := n.Kubectl(t, "get", "secret", "-n", "shop", "of-first-order", "-o", "jsonpath={.metadata.ownerReferences[0].uid}")
	if uid := n.Kubectl(t, "get", "order", "-n", "shop", "first", "-o", "jsonpath={.metadata.uid}"); owner != uid || uid == "" {
		t.Errorf("the Secret's owner is %q, and the order is %q", owner, uid)
	}
	if account, err := n.Client.CoreV1().ServiceAccounts("shop").Get(ctx, "default", metav1.GetOptions{}); err != nil || len(account.ImagePullSecrets) != 1 {
		t.Errorf("the service account: %v, %v", err, account)
	}
	for _, absent := range [][]string{{"deployment", "-n=kube-system", "traefik"}, {"crd", "addons.k3s.cattle.io"}, {"node", "old"}, {"secret", "-n=kube-system", "k3s-serving"}} {
		if out, err := n.TryKubectl(nil, append([]string{"get"}, absent...)...); err == nil {
			t.Errorf("k3s's own part was imported:\n%s", out)
		}
	}
	harness.Eventually(t, harness.Patient(time.Minute), func() error {
		_, err := n.TryKubectl(nil, "wait", "--for=condition=Ready", "pod/alone", "pod/db-0", "-n", "shop", "--timeout=5s")
		return err
	})
}
