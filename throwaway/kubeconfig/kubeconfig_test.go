package kubeconfig

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

func add(path, name string) error {
	return change(path, func(all *api.Config) bool {
		all.Contexts[name] = &api.Context{Cluster: name}
		return true
	})
}

// kubectl changes the file while a file beside it exists.
func TestKubeconfigIsChangedUnderKubectlsLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path+".lock", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- add(path, "ours") }()
	select {
	case err := <-done:
		t.Fatalf("changed while kubectl has the lock: %v", err)
	case <-time.After(10 * lockRetry):
	}
	// kubectl's change, which ours must not undo.
	c := api.NewConfig()
	c.Contexts["theirs"] = &api.Context{Cluster: "theirs"}
	if err := clientcmd.WriteToFile(*c, path); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path + ".lock"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	c, err := clientcmd.LoadFromFile(path)
	if err != nil || c.Contexts["ours"] == nil || c.Contexts["theirs"] == nil {
		t.Errorf("%v, %v", c.Contexts, err)
	}
	if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestKubeconfigLockThatStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path+".lock", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(path, "x"); err == nil || !strings.Contains(err.Error(), "remove "+path+".lock if there is no such program") {
		t.Errorf("%v", err)
	}
}

// Under sudo the file is another user's, and often a link into a folder of settings.
func TestKubeconfigStaysWhatItIs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: gives files to another user")
	}
	const user = 12345
	home := t.TempDir()
	real, link := filepath.Join(home, "dotfiles", "kube"), filepath.Join(home, ".kube", "config")
	for _, dir := range []string{filepath.Dir(real), filepath.Dir(link)} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(real, nil, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(real, user, user); err != nil {
		t.Fatal(err)
	}
	if err := add(link, "x"); err != nil {
		t.Fatal(err)
	}
	if to, err := os.Readlink(link); err != nil || to != real {
		t.Errorf("the link is %q, %v", to, err)
	}
	is := func(path string, mode os.FileMode) {
		t.Helper()
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if uid := st.Sys().(*syscall.Stat_t).Uid; uid != user || st.Mode().Perm() != mode {
			t.Errorf("%s is of %d with mode %o", path, uid, st.Mode().Perm())
		}
	}
	is(real, 0o640)
	// In a home without any, file and folder are the user's.
	other := t.TempDir()
	if err := os.Chown(other, user, user); err != nil {
		t.Fatal(err)
	}
	if err := add(filepath.Join(other, ".kube", "config"), "x"); err != nil {
		t.Fatal(err)
	}
	is(filepath.Join(other, ".kube"), 0o700)
	is(filepath.Join(other, ".kube", "config"), 0o600)
}

// TestKubeconfigIsNoDevice: a pipe stands for /dev/null, which is no name for "no kubeconfig".
func TestKubeconfigIsNoDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(path, "ours"); err == nil || !strings.Contains(err.Error(), "is not a regular file") {
		t.Errorf("a pipe: %v", err)
	}
	if err := Drop(path, "ours"); err != nil {
		t.Errorf("removed: %v", err)
	}
	if st, err := os.Lstat(path); err != nil || st.Mode().Type() != os.ModeNamedPipe {
		t.Errorf("the pipe is %v, %v", st, err)
	}
}
