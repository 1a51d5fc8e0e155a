package identity

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func testIdentity(dir string) Config {
	address := netip.MustParseAddr("192.0.2.1")
	return Config{
		Dir: dir, NodeName: "s1", HTTPSPort: 6443, AdvertiseAddress: address, NodeIPs: []netip.Addr{address},
		ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local",
		Kubeconfig: filepath.Join(dir, "kubeconfig"), KubeconfigMode: 0o600, KubeconfigName: "default",
	}
}

// contentOf is every file below dir with what is in it.
func contentOf(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			var data []byte
			data, err = os.ReadFile(path)
			all[path] = string(data)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestEstablished damages each file on which a cluster rests: with a store there it is refused, names the file, and
// nothing is written; all that the server makes for itself is made again.
func TestEstablished(t *testing.T) {
	now := time.Now()
	foreign, whole := t.TempDir(), t.TempDir()
	for _, dir := range []string{foreign, whole} {
		if _, err := Prepare(testIdentity(dir), now); err != nil {
			t.Fatal(err)
		}
	}
	shared, _ := SharedFiles()
	rests := map[string]bool{filepath.Join("tls", servingKubelet+".key"): true}
	for _, name := range shared {
		rests[name] = true
	}
	for path := range contentOf(t, foreign) {
		name, _ := filepath.Rel(foreign, path)
		for what, damage := range map[string]func(b []byte) []byte{
			"missing":        func([]byte) []byte { return nil },
			"empty":          func([]byte) []byte { return []byte{} },
			"half":           func(b []byte) []byte { return b[:len(b)/2] },
			"garbage":        func(b []byte) []byte { return bytes.Repeat([]byte("x"), len(b)) },
			"a flipped bit":  func(b []byte) []byte { b[2*len(b)/3] ^= 1; return b },
			"another node's": func([]byte) []byte { b, _ := os.ReadFile(filepath.Join(foreign, name)); return b },
		} {
			t.Run(strings.ReplaceAll(name, "/", " ")+" "+what, func(t *testing.T) {
				dir := t.TempDir()
				cfg := testIdentity(dir)
				if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
					t.Fatal(err)
				}
				cfg.Established = true
				file := filepath.Join(dir, name)
				content, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				if content = damage(content); content == nil {
					err = os.Remove(file)
				} else {
					err = os.WriteFile(file, content, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
				before := contentOf(t, dir)
				_, err = Prepare(cfg, now)
				if rests[name] && err == nil {
					// A bit of the public key, which is in the file too, but nobody reads it there.
					had, _, _ := readFingerprints(testIdentity(whole), now)
					has, _, _ := readFingerprints(cfg, now)
					if what != "a flipped bit" || fmt.Sprint(had) != fmt.Sprint(has) {
						t.Errorf("%v was accepted in place of %v", has, had)
					}
					return
				}
				if name == knownFile && what == "another node's" {
					if !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), file) {
						t.Error(err)
					}
					return
				}
				if rests[name] {
					if !errors.Is(err, ErrLost) || !strings.Contains(err.Error(), strings.TrimSuffix(file, filepath.Ext(file))) || !strings.Contains(err.Error(), "backup") || strings.Contains(err.Error(), "\n") {
						t.Errorf("%v", err)
					}
					if after := contentOf(t, dir); fmt.Sprint(before) != fmt.Sprint(after) {
						t.Error("something was written")
					}
					return
				}
				if err != nil {
					t.Fatalf("it cannot be made again: %v", err)
				}
				// What is there now is good: a next start has nothing to do but what it always does.
				after := contentOf(t, dir)
				delete(after, filepath.Join(dir, "tls", "client-node.crt"))
				if _, err := Prepare(cfg, now); err != nil {
					t.Fatal(err)
				}
				again := contentOf(t, dir)
				delete(again, filepath.Join(dir, "tls", "client-node.crt"))
				if fmt.Sprint(after) != fmt.Sprint(again) {
					t.Error("it was not mended at once")
				}
			})
		}
	}
}

// TestEstablishedBefore: the server of an earlier kedge has no fingerprints yet.
func TestEstablishedBefore(t *testing.T) {
	cfg := testIdentity(t.TempDir())
	if _, err := Prepare(cfg, time.Now()); err != nil {
		t.Fatal(err)
	}
	known := filepath.Join(cfg.Dir, knownFile)
	if err := os.Remove(known); err != nil {
		t.Fatal(err)
	}
	cfg.Established = true
	if _, err := Prepare(cfg, time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(known); err != nil {
		t.Error(err)
	}
}

// TestOwnAuthority: an administrator may bring authorities of their own before the first start.
func TestOwnAuthority(t *testing.T) {
	own := t.TempDir()
	if _, err := Prepare(testIdentity(own), time.Now()); err != nil {
		t.Fatal(err)
	}
	cfg := testIdentity(t.TempDir())
	if err := os.MkdirAll(cfg.tlsDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, ext := range []string{".crt", ".key"} {
		data, err := os.ReadFile(filepath.Join(own, "tls", "client-ca"+ext))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(cfg.tlsDir(), "client-ca"+ext), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	id, err := Prepare(cfg, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	want, _ := os.ReadFile(filepath.Join(own, "tls", "client-ca.crt"))
	if !bytes.Equal(id.ClientCA.PEM(), want) {
		t.Error("another was made")
	}
}

// TestKeyChange: keys for secrets are changed by having the old and the new one for a while.
func TestKeyChange(t *testing.T) {
	cfg := testIdentity(t.TempDir())
	if _, err := Prepare(cfg, time.Now()); err != nil {
		t.Fatal(err)
	}
	cfg.Established = true
	path := filepath.Join(cfg.Dir, encryptionConfig)
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	i := strings.Index(string(old), "      - name: key1")
	both := string(old[:i]) + "      - name: key2\n        secret: c2VjcmV0IG9mIDMyIGJ5dGVzLCB3aGljaCBpdCBuZWVk\n" + string(old[i:])
	j := strings.Index(both, "      - name: key1")
	after := both[:j] + both[strings.Index(both, "  - identity"):]
	for _, content := range []string{both, after} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Prepare(cfg, time.Now()); err != nil {
			t.Errorf("%s: %v", content, err)
		}
	}
	if err := os.WriteFile(path, old, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(cfg, time.Now()); !errors.Is(err, ErrLost) {
		t.Errorf("the old key alone: %v", err)
	}
}

// TestReplaceEncryption: after each step of a change of the keys the next start accepts the files as they are, and afterwards
// it refuses the former file and another cluster's.
func TestReplaceEncryption(t *testing.T) {
	now := time.Now()
	dir := t.TempDir()
	cfg := testIdentity(dir)
	if _, err := Prepare(cfg, now); err != nil {
		t.Fatal(err)
	}
	cfg.Established = true
	path, known := EncryptionConfigFile(dir), filepath.Join(dir, knownFile)
	read := func(path string) []byte {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	with := func(keys ...string) []byte {
		text := "kind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers:\n"
		for _, k := range keys {
			text += "  - secretbox: {keys: [{name: " + k + ", secret: " + k + "}]}\n"
		}
		return []byte(text + "  - identity: {}\n")
	}
	foreign := with("x")
	before := with("a")
	if err := ReplaceEncryption(dir, before); err != nil {
		t.Fatal(err)
	}
	for i, next := range [][]byte{with("a", "b"), with("b", "a"), with("b"), with(), with("c"), with("c", "d")} {
		old := read(known)
		if err := ReplaceEncryption(dir, next); err != nil {
			t.Fatal(err)
		}
		// The fingerprints between the two writes, whose file may be either.
		final := read(known)
		if err := os.WriteFile(known, old, 0o600); err != nil {
			t.Fatal(err)
		}
		prints := func(text []byte) []string {
			t.Helper()
			keys, err := keysIn(text, path)
			if err != nil {
				t.Fatal(err)
			}
			return keys
		}
		both := append(prints(before), prints(next)...)
		if len(prints(before)) == 0 || len(prints(next)) == 0 {
			both = nil
		}
		if err := rememberKeys(dir, encryptionConfig, both); err != nil {
			t.Fatal(err)
		}
		for _, file := range [][]byte{before, next} {
			if err := os.WriteFile(path, file, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := check(cfg, now); err != nil {
				t.Errorf("change %d, between: %v", i, err)
			}
		}
		if err := os.WriteFile(known, final, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := check(cfg, now); err != nil {
			t.Errorf("change %d: %v", i, err)
		}
		if len(prints(next)) > 0 {
			for what, file := range map[string][]byte{"another cluster's": foreign, "one without keys": with()} {
				if err := os.WriteFile(path, file, 0o600); err != nil {
					t.Fatal(err)
				}
				if err := check(cfg, now); !errors.Is(err, ErrLost) {
					t.Errorf("change %d, %s: %v", i, what, err)
				}
			}
			if err := os.WriteFile(path, next, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		before = next
	}
}
