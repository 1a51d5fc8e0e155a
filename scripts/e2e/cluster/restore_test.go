package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestRestoreOfCluster restores a snapshot of three servers on one of them. While another one runs it is refused. The others join
// anew, and keep their datastores of before.
func TestRestoreOfCluster(t *testing.T) {
	f := harness.NewFleet(t, "--disable-agent")
	all := []*harness.Node{f.Node}
	for range 2 {
		s := newServer(t, f)
		s.Flags = append(s.Flags, "--disable-agent")
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	three := func() error {
		if list := serverList(t, f.Node); len(list) != 3 || strings.Contains(fmt.Sprint(list), "learner") {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	}
	harness.Eventually(t, 30*time.Second, three)
	ns := f.Namespace(t)
	f.Apply(t, ns, `{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {word: then}}`)
	snapshot, _, _ := strings.Cut(all[1].Kedge(t, "snapshot", "save"), "\n") // of another server than the one that is restored
	f.Apply(t, ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: later}}`)

	// The first server is on a machine of its own, which sees nothing of the folders of the others.
	data, err := os.ReadFile(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(f.DataDir(), "snapshots")
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, filepath.Base(snapshot)), data, 0o600)); err != nil {
		t.Fatal(err)
	}
	restore := func() (string, error) { return f.RunKedge("snapshot", "restore", filepath.Base(snapshot)) }
	f.Stop(t, syscall.SIGTERM, 20*time.Second)
	harness.Eventually(t, 20*time.Second, func() error { // the two go on
		_, err := all[1].Client.CoreV1().Namespaces().Get(context.Background(), ns, metav1.GetOptions{})
		return err
	})
	if out, err := restore(); err == nil || !strings.Contains(out, "another server of the cluster still runs") {
		t.Fatalf("while others run: %v\n%s", err, out)
	}
	for _, s := range all[1:] { // the second has no majority, and may need the whole time that a stop may take
		if err := s.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := restore(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	for _, s := range all[1:] {
		if out, err := s.RunKedge("server", "reset", "--config="+filepath.Join(s.Dir, "config.yaml"), "--data-dir="+s.DataDir()); err != nil || !strings.Contains(out, "store.removed-") {
			t.Fatalf("%v\n%s", err, out)
		}
		s.Flags = []string{"--server=" + f.URL(), "--token=" + f.ServerToken(t), "--disable-agent"}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		if kept, err := filepath.Glob(filepath.Join(s.DataDir(), "server", "store.removed-*", "member")); err != nil || len(kept) != 1 {
			t.Errorf("%s keeps %v, %v", s.Name, kept, err)
		}
	}
	harness.Eventually(t, 30*time.Second, three)
	for _, s := range all {
		secret, err := s.Client.CoreV1().Secrets(ns).Get(context.Background(), "s", metav1.GetOptions{})
		if err != nil || string(secret.Data["word"]) != "then" {
			t.Errorf("%s: the Secret is %v, %v", s.Name, secret, err)
		}
		if _, err := s.Client.CoreV1().ConfigMaps(ns).Get(context.Background(), "later", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Errorf("%s: what came after the snapshot is there: %v", s.Name, err)
		}
	}
}
