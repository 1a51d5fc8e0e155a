package namespaces

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

func requireRoot(t *testing.T) *Network {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: creates network namespaces")
	}
	ns, err := NewNetwork()
	if err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

func mustProbe(t *testing.T, path string) NetworkID {
	t.Helper()
	id, err := ProbeNetwork(path)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestNewIsEmptyAndOurOwnStays(t *testing.T) {
	home := mustProbe(t, "/proc/self/ns/net")
	ns := requireRoot(t)
	if ns.ID() == home {
		t.Fatal("a new namespace is the old one")
	}
	if now := mustProbe(t, "/proc/thread-self/ns/net"); now != home {
		t.Error("the caller was left in the new namespace")
	}
	var names []string
	err := ns.Do(func() error {
		links, err := net.Interfaces()
		for _, l := range links {
			names = append(names, l.Name)
		}
		return err
	})
	if err != nil || len(names) == 0 || names[0] != "lo" {
		t.Errorf("interfaces %v, %v, want lo first", names, err)
	}
	var inside NetworkID
	if err := ns.Do(func() (err error) { inside, err = ProbeNetwork("/proc/thread-self/ns/net"); return err }); err != nil || inside != ns.ID() {
		t.Errorf("inside Do: namespace %v, %v, want %v", inside, err, ns.ID())
	}
}

func TestPathAndIdentity(t *testing.T) {
	ns, other := requireRoot(t), requireRoot(t)
	again, err := OpenNetwork(ns.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if again.ID() != ns.ID() || ns.ID() == other.ID() {
		t.Errorf("identities %v, opened again %v, another %v", ns.ID(), again.ID(), other.ID())
	}
}

func TestDoReturnsErrors(t *testing.T) {
	ns := requireRoot(t)
	want := errors.New("from inside")
	if err := ns.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("Do: %v", err)
	}
	if err := ns.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("a function that never returned is no error")
	}
	ns.Close()
	if err := ns.Do(func() error { return nil }); err == nil {
		t.Error("a closed namespace can be entered")
	}
}

func TestWhatIsNoNamespace(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		want error
	}{
		{file, ErrNotNetwork},
		{"/proc/self/ns/mnt", ErrNotNetwork},
		{filepath.Join(t.TempDir(), "gone"), fs.ErrNotExist},
	} {
		if _, err := ProbeNetwork(c.path); !errors.Is(err, c.want) {
			t.Errorf("ProbeNetwork(%s): %v, want %v", c.path, err, c.want)
		}
	}
}
