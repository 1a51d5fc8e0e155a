package storage

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/errorkind"
	"kedge/scripts/e2e/harness"
	"kedge/scripts/keptfiles"
)

// keptNode is a node whose files are damaged, with what must not get lost.
type keptNode struct {
	*harness.Node
	other *harness.Node // whose files are taken in place of its own
	ns    string
}

// keptFile is a file of the node with its entry in the list.
type keptFile struct {
	keptfiles.File
	path string
}

// rootsOf are the directories that the list is about.
func rootsOf(n *harness.Node) map[keptfiles.Dir]string {
	return map[keptfiles.Dir]string{keptfiles.Data: n.DataDir(), keptfiles.Run: n.RunDir()}
}

// files are all files of the node. One that is not on the list fails the test.
func keptFiles(t *testing.T, n *harness.Node) (all []keptFile) {
	t.Helper()
	for dir, root := range rootsOf(n) {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it came and went
			}
			if err != nil {
				return err
			}
			name, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			if d.IsDir() {
				// What is mounted there is the containers'.
				if dir == keptfiles.Run && strings.HasSuffix(name, "rootfs") || dir == keptfiles.Data && name == "kubelet/pods" {
					return fs.SkipDir
				}
				return nil
			}
			f, ok := keptfiles.Find(dir, name)
			if !ok {
				t.Errorf("%s/%s is not on the list in scripts/keptfiles: say what it holds, and what happens when it is damaged", dir, name)
				return nil
			}
			all = append(all, keptFile{f, path})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	slices.SortFunc(all, func(a, b keptFile) int { return strings.Compare(a.path, b.path) })
	return all
}

// damaged damages a file and returns what puts it back.
func (k *keptNode) damaged(f keptFile, d keptfiles.Damage) (restore func() error, err error) {
	before, err := os.ReadFile(f.path)
	if err != nil {
		return nil, err
	}
	st, err := os.Lstat(f.path)
	if err != nil {
		return nil, err
	}
	// In its place and not into it: of a program that runs the kernel lets nobody write.
	write := func(content []byte) error {
		if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return errors.Join(os.WriteFile(f.path, content, st.Mode()), os.Chmod(f.path, st.Mode()))
	}
	restore = func() error { return write(before) }
	after := bytes.Clone(before)
	switch d {
	case keptfiles.Missing:
		return restore, os.Remove(f.path)
	case keptfiles.Empty:
		after = nil
	case keptfiles.Truncated:
		after = after[:len(after)/2]
	case keptfiles.Flipped:
		used := len(bytes.TrimRight(after, "\x00"))
		for i := range 4 {
			if used > 0 {
				after[used*(2*i+1)/8] ^= 0x04
			}
		}
	case keptfiles.Foreign:
		root := rootsOf(k.Node)[f.Dir]
		name, err := filepath.Rel(root, f.path)
		if err != nil {
			return nil, err
		}
		if after, err = os.ReadFile(filepath.Join(rootsOf(k.other)[f.Dir], name)); errors.Is(err, fs.ErrNotExist) {
			return nil, nil // it has none like it
		} else if err != nil {
			return nil, err
		}
	}
	return restore, write(after)
}

// intact checks that nothing is lost: objects, what is encrypted, and the pod that ran all the time, with its container
// if that is given.
func (k *keptNode) intact(t *testing.T, container string) {
	t.Helper()
	ctx := context.Background()
	list, err := k.Client.CoreV1().ConfigMaps(k.ns).List(ctx, metav1.ListOptions{LabelSelector: "kept=yes"})
	if err != nil || len(list.Items) != keptObjects {
		t.Errorf("of %d objects there are %d, %v", keptObjects, len(list.Items), err)
	}
	secret, err := k.Client.CoreV1().Secrets(k.ns).Get(ctx, "kept", metav1.GetOptions{})
	if err != nil || string(secret.Data["a"]) != "secret" {
		t.Errorf("the secret: %v", err)
	}
	eventuallyRunning(t, k.Node, 30*time.Second, "the pod", func() error {
		p, err := k.Pod(k.ns, "lives")
		if err != nil {
			return err
		}
		if len(p.Status.ContainerStatuses) == 0 || p.Status.ContainerStatuses[0].State.Running == nil || container != "" && p.Status.ContainerStatuses[0].ContainerID != container {
			return fmt.Errorf("its container was %s, and now it has %+v", container, p.Status.ContainerStatuses)
		}
		return nil
	})
}

const keptObjects = 20

// refusesBecauseOf starts the node, which must end by itself with a sentence that names the file, or a directory that it
// belongs to, and what helps.
func (k *keptNode) refusesBecauseOf(t *testing.T, what, path string) {
	t.Helper()
	_ = os.Remove(k.LogFile())
	if err := k.Launch(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-k.Done:
	case <-time.After(harness.Patient(30 * time.Second)):
		t.Errorf("%s: still running\n%s", what, k.Tail(5))
		if err := k.Signal(syscall.SIGTERM, 15*time.Second); err != nil {
			t.Fatal(err)
		}
		return
	}
	var exit *exec.ExitError
	if !errors.As(k.Err, &exit) || exit.ExitCode() != errorkind.ExitConfig {
		t.Errorf("%s: it ended with %v, want exit code %d", what, k.Err, errorkind.ExitConfig)
	}
	last := k.Tail(1)
	if k.Machine != nil { // where the directory has another path
		path = "/var/lib/kedge" + strings.TrimPrefix(path, k.DataDir())
	}
	named := strings.Contains(last, path) || strings.Contains(last, strings.TrimSuffix(path, filepath.Ext(path)))
	if strings.HasSuffix(path, "kedge.json") { // another node's directory is meant as a whole
		named = strings.Contains(last, filepath.Dir(path))
	}
	helps := slices.ContainsFunc([]string{"restore", "remove", "--node-name", "mount"}, func(s string) bool { return strings.Contains(last, s) })
	if !named || !helps || !strings.HasPrefix(last, "kedge: ") {
		t.Errorf("%s: it does not say which file, and what helps:\n%s", what, k.Tail(8))
	}
	if log := k.Tail(2000); strings.Contains(log, "goroutine ") {
		t.Errorf("%s: it ended with a dump:\n%s", what, k.Tail(20))
	}
}

// TestKeptFiles damages all files of a node: first those without which it may not start, one by one, and then the others
// in rounds, many at a time. Each gets another damage at each round.
func TestKeptFiles(t *testing.T) {
	t.Parallel()
	k := &keptNode{Node: harness.Own(t), other: harness.Own(t)}
	if err := k.other.Start(); err != nil {
		t.Fatal(err)
	}
	k.other.Stop(t, syscall.SIGTERM, 15*time.Second)
	if err := harness.PrepareImages(k.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := k.Start(); err != nil {
		t.Fatal(err)
	}
	k.ns = k.Namespace(t)
	ctx := context.Background()
	for i := range keptObjects {
		c := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("kept", i), Labels: map[string]string{"kept": "yes"}}, Data: map[string]string{"a": strings.Repeat("x", 3000)}}
		if _, err := k.Client.CoreV1().ConfigMaps(k.ns).Create(ctx, c, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "kept"}, Data: map[string][]byte{"a": []byte("secret")}}
	if _, err := k.Client.CoreV1().Secrets(k.ns).Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	// When its record is damaged beyond repair, its container is made again.
	k.Apply(t, k.ns, strings.Replace(harness.Shell("lives", "sleep 1000000", ""), "restartPolicy: Never", "restartPolicy: Always", 1))
	container := k.WaitPod(t, k.ns, "lives", false).Status.ContainerStatuses[0].ContainerID
	keptFiles(t, k.Node) // while it runs there are others
	k.Stop(t, syscall.SIGTERM, 15*time.Second)

	rounds, long := 2, os.Getenv("KEDGE_TEST_LONG") != ""
	if long {
		rounds = len(keptfiles.Damages())
	}
	k.refusals(t, long, func(keptFile) bool { return true })
	ofContainerd := func(f keptFile) bool { return strings.HasPrefix(f.Path, "containerd/") }
	// KEDGE_KEPT is for how long the rounds go on, such as 10m or, for all night, 8h.
	soak, err := time.ParseDuration(cmp.Or(os.Getenv("KEDGE_KEPT"), "0s"))
	if err != nil {
		t.Fatal(err)
	}
	for begin, round := time.Now(), 0; round < rounds || time.Since(begin) < soak; round++ {
		k.round(t, round, func(f keptFile) bool { return !ofContainerd(f) }, container)
		if t.Failed() {
			return // what is damaged stays so
		}
	}
	k.lost(t)
	// A container of which containerd knows nothing any more is made again.
	for round := range rounds - 1 {
		k.round(t, round, ofContainerd, "")
		if t.Failed() {
			return
		}
	}
	if err := k.Start(); err != nil {
		t.Fatal(err)
	}
	k.intact(t, "")
}

// refusals damages the files without which the node may not start.
func (k *keptNode) refusals(t *testing.T, long bool, of func(keptFile) bool) {
	all := slices.DeleteFunc(keptFiles(t, k.Node), func(f keptFile) bool { return !of(f) })
	for i, f := range all {
		tried := false
		for j := range keptfiles.Damages() {
			d := keptfiles.Damages()[(i+j)%len(keptfiles.Damages())]
			if f.On[d] != keptfiles.Refused || tried && !long {
				continue
			}
			what := fmt.Sprintf("%s %v", f.Path, d)
			restore, err := k.damaged(f, d)
			if err != nil {
				t.Fatal(err)
			}
			if restore == nil || d == keptfiles.Flipped && strings.HasSuffix(f.path, ".key") {
				// Some bits of a key's file are in nothing that counts.
				if restore != nil {
					err = restore()
				}
				if err != nil {
					t.Fatal(err)
				}
				continue
			}
			tried = true
			k.refusesBecauseOf(t, what, f.path)
			if err := restore(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// round damages all files of a kind but those, and has the node start with that.
func (k *keptNode) round(t *testing.T, round int, of func(keptFile) bool, container string) {
	what, repaired := k.damageAll(t, round, of)
	_ = os.Remove(k.LogFile())
	if err := k.Start(); err != nil {
		t.Errorf("with %s:\n%v", strings.Join(what, "\n"), err)
		return
	}
	k.intact(t, container)
	if got := k.RunPod(t, k.ns, fmt.Sprintf("new-%d-%t", round, container == ""), "echo new", ""); got != "new\n" {
		t.Errorf("a new pod says %q", got)
	}
	log := k.Tail(100000)
	for _, path := range repaired {
		if !strings.Contains(log, filepath.Base(path)) {
			t.Errorf("the log does not say that %s was repaired", path)
		}
	}
	if t.Failed() {
		t.Logf("with %s", strings.Join(what, "\n"))
	}
	keptFiles(t, k.Node)
	k.Stop(t, syscall.SIGTERM, 15*time.Second)
}

// damageAll damages all files of a kind but those without which the node may not start, and says how, and which of them
// must be repaired with a word in the log.
func (k *keptNode) damageAll(t *testing.T, round int, of func(keptFile) bool) (what, repaired []string) {
	for i, f := range keptFiles(t, k.Node) {
		d := keptfiles.Damages()[(i+round)%len(keptfiles.Damages())]
		if f.On[d] == keptfiles.Refused || !of(f) {
			continue
		}
		if st, err := os.Lstat(f.path); err != nil || !st.Mode().IsRegular() || strings.HasSuffix(f.Path, "/**") {
			continue
		}
		restore, err := k.damaged(f, d)
		if err != nil {
			t.Fatal(err)
		}
		if restore == nil {
			continue
		}
		what = append(what, fmt.Sprintf("%s %v", f.path, d))
		// Bits may be in what is not used, and another node's file may be as good.
		if f.On[d] == keptfiles.Repaired && d != keptfiles.Flipped && d != keptfiles.Foreign {
			repaired = append(repaired, f.path)
		}
	}
	return what, repaired
}

// lost removes whole directories, as when a file system is not mounted.
func (k *keptNode) lost(t *testing.T) {
	for _, name := range []string{"server/store", "server/store/member", "server/store/member/wal", "server/tls", "server"} {
		dir := filepath.Join(k.DataDir(), name)
		aside := filepath.Join(k.Dir, "aside")
		if err := os.Rename(dir, aside); err != nil {
			t.Fatal(err)
		}
		k.refusesBecauseOf(t, name+" missing", dir)
		// What it has made meanwhile holds nothing.
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(aside, dir); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKeptFilesOfAgent damages what an agent keeps of itself: the files without which it may not start one by one, and
// then the others together, each with another damage at each round.
func TestKeptFilesOfAgent(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	a, other := f.StartAgent(t), f.StartAgent(t)
	k := &keptNode{Node: a, other: other}
	ns := f.Namespace(t)
	f.Apply(t, ns, harness.Shell("lives", "exec sleep 1000000", fmt.Sprintf("nodeName: %s,", a.Name)))
	container := f.WaitPod(t, ns, "lives", false).Status.ContainerStatuses[0].ContainerID
	keptFiles(t, k.Node) // while it runs there are others
	other.Stop(t, syscall.SIGTERM, 15*time.Second)
	a.Stop(t, syscall.SIGTERM, 15*time.Second)

	own := func(f keptFile) bool { return strings.HasPrefix(f.Path, "agent/") }
	a.Flags = []string{"--server=" + f.URL()} // tokens are for the first start
	k.refusals(t, true, own)
	for round := range keptfiles.Damages() {
		_ = os.Remove(a.LogFile())
		what, _ := k.damageAll(t, round, own)
		if len(what) == 0 {
			t.Fatal("an agent has no files")
		}
		if err := a.Start(); err != nil {
			t.Fatalf("with %s:\n%v", strings.Join(what, "\n"), err)
		}
		harness.Eventually(t, 20*time.Second, func() error { return f.NodeIsReady(a.Name) })
		p, err := f.Pod(ns, "lives")
		if err != nil || p.Status.ContainerStatuses[0].ContainerID != container {
			t.Errorf("with %s: the pod's container was %s: %v, %+v", strings.Join(what, "\n"), container, err, p)
		}
		a.Stop(t, syscall.SIGTERM, 15*time.Second)
	}
}

// TestReadOnlyParts is TestReadOnlyDirectoryOfNode for directories below the data directory, which may have file systems of
// their own: kedge does not start, or not that part of it which needs the directory, and says which it is.
func TestReadOnlyParts(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	n.Stop(t, syscall.SIGTERM, 15*time.Second)
	readOnly := func(name string) (dir string) {
		dir = filepath.Join(n.DataDir(), name)
		n.World = &harness.World{ReadOnly: []string{dir}}
		return dir
	}
	for _, name := range []string{"server", "server/store", "server/tls"} {
		dir := readOnly(name)
		if got := n.Refusal(t); !strings.Contains(got, dir) || !strings.Contains(got, "read-only file system; make") {
			t.Errorf("with a read-only %s it said\n%s", dir, got)
		}
	}
	for _, part := range []string{"containerd", "kubelet"} {
		dir := readOnly(part)
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
		eventuallyRunning(t, n, 30*time.Second, "the status", func() error {
			out, _ := exec.Command(harness.Binary(), "status", "--run-dir="+n.RunDir()).CombinedOutput()
			for line := range strings.Lines(string(out)) {
				if strings.Contains(line, part) && strings.Contains(line, dir) && strings.Contains(line, "read-only") {
					return nil
				}
			}
			return fmt.Errorf("it does not say that %s is read-only:\n%s", dir, out)
		})
		n.Stop(t, syscall.SIGTERM, 15*time.Second)
	}
	n.World = nil
	if err := n.Start(); err != nil {
		t.Fatalf("when all can be written again: %v", err)
	}
}
