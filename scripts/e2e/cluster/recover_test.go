package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestRecover: two of three servers are switched off for good. The third serves again, alone, with everything that it has, and
// pods go on, on its node and on an agent's. A lost server that comes back with its old data does no harm, and joins after a reset.
func TestRecover(t *testing.T) {
	f := harness.NewFleet(t, "--disable-agent")
	s, third := newServer(t, f), newServer(t, f)
	third.Flags = append(third.Flags, "--disable-agent")
	if err := harness.PrepareImages(s.DataDir()); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*harness.Node{s, third} {
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
	}
	servers := func(at *harness.Node, count int) {
		t.Helper()
		harness.Eventually(t, 30*time.Second, func() error {
			if list := serverList(t, at); len(list) != count || strings.Contains(fmt.Sprint(list), "learner") {
				return fmt.Errorf("the servers are %v", list)
			}
			return nil
		})
	}
	servers(s, 3)
	ns := s.Namespace(t)
	s.Apply(t, ns, `{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {word: then}}`)
	agent := f.StartAgent(t)
	for _, n := range []*harness.Node{s, agent} {
		pod := "stays-" + n.Name
		s.Apply(t, ns, harness.Shell(pod, "sleep 3600", "nodeName: "+n.Name+","))
		s.WaitPod(t, ns, pod, false)
	}
	harness.Eventually(t, 60*time.Second, func() error { // late, as its namespace is
		_, err := s.Client.CoordinationV1().Leases("kube-node-lease").Get(context.Background(), s.Name, metav1.GetOptions{})
		return err
	})
	serverToken := s.ServerToken(t)
	podToken, err := s.Client.CoreV1().ServiceAccounts(ns).CreateToken(context.Background(), "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.Apply(t, ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: last}}`) // acknowledged by s, so s has it
	f.Stop(t, syscall.SIGKILL, 20*time.Second)
	third.Stop(t, syscall.SIGKILL, 20*time.Second)

	run := func(n *harness.Node, args ...string) (string, error) {
		return n.RunKedge(append(args, "--config="+filepath.Join(n.Dir, "config.yaml"), "--data-dir="+n.DataDir())...)
	}
	if out, err := run(s, "recover"); err == nil || !strings.Contains(out, "stop it first") {
		t.Errorf("while kedge runs: %v\n%s", err, out)
	}
	s.Stop(t, syscall.SIGTERM, 30*time.Second)

	// While another member answers, it is refused.
	if err := third.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if out, err := run(s, "recover"); err != nil || !strings.Contains(out, "answers at") {
			return fmt.Errorf("%v\n%s", err, out)
		}
		return nil
	})
	if out, err := run(s, "recover", "--yes"); err == nil || !strings.Contains(out, third.Name+" answers at") || !strings.Contains(out, "--force") {
		t.Errorf("while another server answers: %v\n%s", err, out)
	}
	third.Stop(t, syscall.SIGKILL, 20*time.Second)

	other, err := run(third, "recover", "-o=json")
	if err != nil {
		t.Fatalf("%v\n%s", err, other)
	}
	file := filepath.Join(t.TempDir(), "other.json")
	if err := os.WriteFile(file, []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run(s, "recover", "--compare="+file); err != nil || strings.Count(out, "last entry") != 2 || !strings.Contains(out, "by the clock of "+third.Name) {
		t.Errorf("compared: %v\n%s", err, out)
	}
	out, err := run(s, "recover")
	if err != nil || !strings.Contains(out, "kedge recover --yes\" makes this one") || strings.Count(out, ", by the clock of ") != 2 {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("kedge recover:\n%s", out)
	if out, err = run(s, "recover", "--yes"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("kedge recover --yes:\n%s", out)
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*harness.Node{s, agent} {
		(&harness.Fleet{Node: s}).StillRuns(t, ns, "stays-"+n.Name)
	}
	checkRecovered(t, s, ns, podToken.Status.Token)
	servers(s, 1)

	// A server of before comes back with its old data, and waits for its old majority.
	if err := third.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if len(third.LogLines(t, "waiting for a majority")) == 0 {
			return fmt.Errorf("it does not wait:\n%s", third.Tail(20))
		}
		return nil
	})
	s.Apply(t, ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: later}}`)
	servers(s, 1)
	third.Stop(t, syscall.SIGTERM, 30*time.Second)
	if out, err := run(third, "server", "reset"); err != nil || !strings.Contains(out, "store.removed-") {
		t.Fatalf("%v\n%s", err, out)
	}
	third.Flags = []string{fmt.Sprintf("--server=https://%s:%d", s.Address(t), s.APIPort), "--token=" + serverToken, "--disable-agent"}
	if err := third.Start(); err != nil {
		t.Fatal(err)
	}
	servers(s, 2)
	harness.Eventually(t, 30*time.Second, func() error { return forgotten(s, f.Name) }) // it never comes back
	if kept, err := filepath.Glob(filepath.Join(third.DataDir(), "server", "store.removed-*", "member")); err != nil || len(kept) != 1 {
		t.Errorf("%s keeps %v, %v", third.Name, kept, err)
	}
	for _, name := range []string{"last", "later"} {
		if _, err := third.Client.CoreV1().ConfigMaps(ns).Get(context.Background(), name, metav1.GetOptions{}); err != nil {
			t.Errorf("%s on the server that joined: %v", name, err)
		}
	}
}

// checkRecovered checks that a recovered server has what it had, and runs pods.
func checkRecovered(t *testing.T, s *harness.Node, ns, podToken string) {
	t.Helper()
	secret, err := s.Client.CoreV1().Secrets(ns).Get(context.Background(), "s", metav1.GetOptions{})
	if err != nil || string(secret.Data["word"]) != "then" {
		t.Errorf("the Secret is %v, %v", secret, err)
	}
	if _, err := s.Client.CoreV1().ConfigMaps(ns).Get(context.Background(), "last", metav1.GetOptions{}); err != nil {
		t.Errorf("the last write: %v", err)
	}
	review, err := s.Client.AuthenticationV1().TokenReviews().Create(context.Background(), &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: podToken}}, metav1.CreateOptions{})
	if err != nil || !review.Status.Authenticated {
		t.Errorf("the token of a service account: %+v, %v", review, err)
	}
	if got := s.RunPod(t, ns, "after", "echo after", ""); got != "after\n" {
		t.Errorf("a new pod printed %q", got)
	}
}
