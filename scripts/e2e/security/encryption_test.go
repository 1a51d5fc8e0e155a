package security

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestSecretsEncryptRotate replaces the key of 2,000 Secrets, with kill -9 in the middle, then once without, and switches the
// encryption off and on. No Secret is lost, none has an old key, and none is ever plain text while encryption is on.
func TestSecretsEncryptRotate(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--disable-agent")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	const count, canary = 2000, "canary-77ab1e-hidden"
	began := time.Now()
	createSecrets(t, n, count, canary)
	t.Logf("created %d Secrets in %s", count, harness.Since(began))

	n.Kedge(t, "secrets-encrypt", "rotate", "--no-wait")
	harness.Eventually(t, 20*time.Second, func() error {
		if s := n.Encryption(t); s.Stage != "rewrite" || s.Done == s.Total {
			if s.Stage == "" || s.Stage == "drop" {
				t.Fatalf("the change has ended before it could be interrupted: %+v", s)
			}
			return fmt.Errorf("it is at %q", s.Stage)
		}
		return nil
	})
	n.Stop(t, syscall.SIGKILL, 10*time.Second)
	if keys := n.SecretKeys(t); keys["key1"] == 0 {
		t.Errorf("killed too late: %v", keys)
	} else {
		t.Logf("when it was killed: %v", keys)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if s := n.Encryption(t); s.Stage != "" || s.Key != "key2" || len(s.Servers) != 1 || !s.Servers[0].Current {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if keys := n.SecretKeys(t); len(keys) != 1 || keys["key2"] < count {
		t.Errorf("after the crash the Secrets have %v", keys)
	}
	checkSecrets(t, n, count, canary)

	began = time.Now()
	out := n.Kedge(t, "secrets-encrypt", "rotate")
	s := n.Encryption(t)
	took := s.Ended.Sub(s.Began)
	t.Logf("%d Secrets in %s of the change, %.0f a second; the command took %s and printed\n%s", s.Total, took.Round(time.Millisecond), float64(s.Total)/took.Seconds(), harness.Since(began), out)
	t.Log(n.LogLines(t, "all Secrets have been rewritten"))
	if s.Key != "key3" || s.Done != s.Total || s.Total < count {
		t.Errorf("%+v", s)
	}
	if out, err := n.TryKedge("secrets-encrypt", "enable"); err == nil || !strings.Contains(out, "encrypted already, with key3") {
		t.Errorf("enable: %v, %s", err, out)
	}
	if path := findInStore(t, n, canary); path != "" {
		t.Errorf("a Secret is readable in %s", path)
	}

	n.Kedge(t, "secrets-encrypt", "disable")
	if out := n.Kedge(t, "secrets-encrypt", "status"); !strings.Contains(out, "off: Secrets are plain text") {
		t.Errorf("status:\n%s", out)
	}
	if path := findInStore(t, n, canary); path == "" {
		t.Error("what is not encrypted is not found either: this test looks in the wrong place")
	}
	n.Kedge(t, "secrets-encrypt", "enable")
	if out := n.Kedge(t, "secrets-encrypt", "status"); !strings.Contains(out, "on, secretbox with key4") {
		t.Errorf("status:\n%s", out)
	}
	checkSecrets(t, n, count, canary)
	n.Stop(t, syscall.SIGTERM, 20*time.Second)
	if keys := n.SecretKeys(t); len(keys) != 1 || keys["key4"] < count {
		t.Errorf("the Secrets have %v", keys)
	}
	if out, err := n.TryKedge("secrets-encrypt", "status"); err == nil || !strings.Contains(out, "kedge is not running") {
		t.Errorf("status of a stopped server: %v, %s", err, out)
	}
}

// createSecrets creates Secrets that contain the canary and their number.
func createSecrets(t *testing.T, n *harness.Node, count int, canary string) {
	t.Helper()
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for k := i; k < count; k += 8 {
				s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("s", k)}, StringData: map[string]string{"k": fmt.Sprint(canary, k)}}
				if _, err := n.Client.CoreV1().Secrets("default").Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
}

// checkSecrets reads all of them.
func checkSecrets(t *testing.T, n *harness.Node, count int, canary string) {
	t.Helper()
	for _, version := range []string{"", "0"} { // from the datastore, and from the API server's cache
		list, err := n.Client.CoreV1().Secrets("default").List(context.Background(), metav1.ListOptions{ResourceVersion: version})
		if err != nil {
			t.Fatal(err)
		}
		good := 0
		for _, s := range list.Items {
			if k, ok := strings.CutPrefix(s.Name, "s"); ok && string(s.Data["k"]) == canary+k {
				good++
			}
		}
		if good != count {
			t.Fatalf("%d of %d Secrets are as they were", good, count)
		}
	}
}

// findInStore returns a file of the datastore that has the text.
func findInStore(t *testing.T, n *harness.Node, text string) (found string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(n.DataDir(), "server/store"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if bytes.Contains(data, []byte(text)) {
			found = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
