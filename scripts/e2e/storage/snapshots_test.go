package storage

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/scripts/e2e/harness"
)

// restored is a cluster that comes back to a snapshot.
type restored struct {
	*harness.Node
	t *testing.T

	ns, token string
	pod       *corev1.Pod
	snapshot  string // path
	key       string
	seen      string // the latest resource version that a client has seen
}

// TestSnapshotAndRestore saves a cluster and restores it: on the same machine, where its pods run on, and on a bare one of
// another name, with nothing but the file and the recovery key.
func TestSnapshotAndRestore(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// The commands read the node's configuration, which has settings that they do not need.
	if err := os.WriteFile(filepath.Join(n.Dir, "config.yaml"), []byte("tls-san: [kedge.example.org]\nkubelet-arg: [max-pods=50]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	r := &restored{Node: n, t: t, ns: n.Namespace(t)}
	r.save()
	r.goOn()
	r.Stop(t, syscall.SIGTERM, 15*time.Second)
	r.refused()
	out := r.command(0, "snapshot", "restore", filepath.Base(r.snapshot))
	if !strings.Contains(out, "the state of before is kept in "+filepath.Join(r.DataDir(), "server.before-restore-")) {
		t.Errorf("restore says\n%s", out)
	}
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	r.check(r.Node)
	r.listed(r.Node)
	r.podsRunOn()
	r.Stop(t, syscall.SIGTERM, 15*time.Second)
	if out, err := r.Command("killall"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	r.onABareMachine()
}

// command runs a kedge command with the node's directories, which must exit with code.
func (r *restored) command(code int, args ...string) string {
	r.t.Helper()
	return commandOf(r.t, r.Node, nil, code, args...)
}

func commandOf(t *testing.T, n *harness.Node, env []string, code int, args ...string) string {
	t.Helper()
	was := n.Env
	n.Env = append(append([]string{}, was...), env...)
	defer func() { n.Env = was }()
	out, err := n.RunKedge(append(args, "--config="+filepath.Join(n.Dir, "config.yaml"), "--data-dir="+n.DataDir(), "--run-dir="+n.RunDir())...)
	got := 0
	if err != nil {
		got = -1
		if exit, ok := err.(interface{ ExitCode() int }); ok {
			got = exit.ExitCode()
		}
	}
	if got != code {
		t.Fatalf("kedge %s ended with %d instead of %d:\n%s", strings.Join(args, " "), got, code, out)
	}
	return out
}

// save makes objects and a pod, and takes the snapshot.
func (r *restored) save() {
	t := r.t
	r.Apply(t, r.ns, `{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {word: canary-then}}`)
	r.Apply(t, r.ns, harness.Shell("keeper", "sleep 3600", ""))
	r.pod = r.WaitPod(t, r.ns, "keeper", false)
	r.token = strings.TrimSpace(r.Kubectl(t, "create", "token", "default", "-n", r.ns, "--duration=1h"))
	lines := strings.Split(strings.TrimSpace(r.Kedge(t, "snapshot", "save", "--name=daily")), "\n")
	r.snapshot = lines[0]
	if filepath.Dir(r.snapshot) != filepath.Join(r.DataDir(), "snapshots") || !strings.HasPrefix(filepath.Base(r.snapshot), "daily-"+r.Name+"-") {
		t.Fatalf("save says %q", lines)
	}
	lines = strings.Split(strings.TrimSpace(r.command(0, "recovery-key", "show")), "\n")
	r.key = lines[len(lines)-1]
	data, err := os.ReadFile(r.snapshot)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{"canary-then", "PRIVATE KEY", r.key, r.ns} {
		if bytes.Contains(data, []byte(secret)) {
			t.Errorf("%q is in the snapshot in plain text", secret)
		}
	}
	if log, err := os.ReadFile(r.LogFile()); err != nil || bytes.Contains(log, []byte(r.key)) {
		t.Errorf("the recovery key is in the log: %v", err)
	}
	if out := r.command(0, "etcd-snapshot", "list"); !strings.Contains(out, filepath.Base(r.snapshot)) {
		t.Errorf("the list is\n%s", out)
	}
	if out := r.command(0, "snapshot", "inspect", filepath.Base(r.snapshot)); !strings.Contains(out, "it is whole") || !strings.Contains(out, r.Name) {
		t.Errorf("inspect says\n%s", out)
	}
}

// goOn changes what the snapshot has.
func (r *restored) goOn() {
	t := r.t
	r.listed(r.Node)
	r.Kubectl(t, "delete", "secret", "-n", r.ns, "s")
	r.Apply(t, r.ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: later}}`)
	later, err := r.Client.CoreV1().ConfigMaps(r.ns).Get(context.Background(), "later", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.seen = later.ResourceVersion
	if out := r.command(1, "snapshot", "restore", r.snapshot); !strings.Contains(out, "stop it first") {
		t.Errorf("while kedge runs, restore says\n%s", out)
	}
}

// listed waits until a cluster has an object for the snapshot.
func (r *restored) listed(n *harness.Node) {
	r.t.Helper()
	harness.Eventually(r.t, 20*time.Second, func() error {
		out, err := n.TryKubectl(nil, "get", "snapshots.kedge.io")
		if err == nil && !strings.Contains(out, filepath.Base(r.snapshot)) {
			err = fmt.Errorf("the snapshots are\n%s", out)
		}
		return err
	})
}

// refused tries keys and files that are wrong.
func (r *restored) refused() {
	const another = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX" // of age's documentation
	if out := commandOf(r.t, r.Node, []string{"KEDGE_RECOVERY_KEY=" + another}, 78, "snapshot", "restore", r.snapshot); !strings.Contains(out, "another key opens it") {
		r.t.Errorf("with another key it says\n%s", out)
	}
	if out := r.command(78, "snapshot", "restore", "missing.kedge"); !strings.Contains(out, "there is no snapshot missing.kedge") {
		r.t.Errorf("a missing file: %s", out)
	}
}

// check compares what a node serves with the snapshot.
func (r *restored) check(n *harness.Node) {
	t, ctx := r.t, context.Background()
	t.Helper()
	secret, err := n.Client.CoreV1().Secrets(r.ns).Get(ctx, "s", metav1.GetOptions{})
	if err != nil || string(secret.Data["word"]) != "canary-then" {
		t.Errorf("%s: the Secret is %v, %v", n.Name, secret, err)
	}
	if _, err := n.Client.CoreV1().ConfigMaps(r.ns).Get(ctx, "later", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("%s: what came after the snapshot is there: %v", n.Name, err)
	}
	// A client that has seen what came later must list anew.
	w, err := n.Client.CoreV1().ConfigMaps(r.ns).Watch(ctx, metav1.ListOptions{ResourceVersion: r.seen})
	if err == nil {
		defer w.Stop()
		err = apierrors.FromObject((<-w.ResultChan()).Object)
	}
	if !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("%s: a watch from version %s got %v", n.Name, r.seen, err)
	}
	config := rest.AnonymousClientConfig(n.Config)
	config.BearerToken = r.token
	bearer, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bearer.CoreV1().Secrets(r.ns).Get(ctx, "s", metav1.GetOptions{}); !apierrors.IsForbidden(err) { // it is known, and may not
		t.Errorf("%s: the token of before: %v", n.Name, err)
	}
}

// podsRunOn checks that the restart and the restore have not touched a pod that the snapshot has.
func (r *restored) podsRunOn() {
	pod := r.WaitPod(r.t, r.ns, "keeper", false)
	was, is := harness.ContainerStatus(r.pod, "main"), harness.ContainerStatus(pod, "main")
	if is.ContainerID != was.ContainerID || is.RestartCount != 0 {
		r.t.Errorf("the container was %s, and is %s with %d restarts", was.ContainerID, is.ContainerID, is.RestartCount)
	}
}

// onABareMachine restores the snapshot where nothing is.
func (r *restored) onABareMachine() {
	t := r.t
	bare := harness.Own(t)
	bare.Flags = nil // the cluster's settings are in the snapshot
	if err := os.MkdirAll(bare.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"config.yaml": "# of a test\n", "key": r.key + "\n"} {
		if err := os.WriteFile(filepath.Join(bare.Dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	restore := []string{"snapshot", "restore", r.snapshot, "--node-name=" + bare.Name}
	if out := commandOf(t, bare, nil, 78, restore...); !strings.Contains(out, "KEDGE_RECOVERY_KEY") {
		t.Errorf("without a key it says\n%s", out)
	}
	if out := commandOf(t, bare, nil, 0, append(restore, "--recovery-key-file="+filepath.Join(bare.Dir, "key"))...); !strings.Contains(out, "joins as a new node") {
		t.Errorf("restore says\n%s", out)
	}
	if err := bare.Start(); err != nil {
		t.Fatal(err)
	}
	r.check(bare)
	harness.Eventually(t, 30*time.Second, func() error {
		_, err := bare.Client.CoreV1().Nodes().Get(context.Background(), r.Name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("the node of the lost server is there: %w", cmp.Or(err, errors.New("found")))
		}
		return nil
	})
}
