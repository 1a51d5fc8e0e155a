package datastore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/kubernetes"

	"kedge/datastore/integrity"
	"kedge/datastore/peers"
)

// damagedKeys is the number of keys in the stores to damage: enough for branch pages in the database.
const damagedKeys = 300

// closedStore makes a store with keys and closes it in order.
func closedStore(t *testing.T, value string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	s, stop := start(t, testConfig(dir))
	c := newClient(t, s)
	for i := range damagedKeys {
		if _, err := c.OptimisticPut(t.Context(), fmt.Sprintf("/k/%04d", i), []byte(strings.Repeat(value, 40)), 0, kubernetes.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	return dir
}

// breakSeal makes a store look like one that was not closed in order.
func breakSeal(t *testing.T, dir string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, integrity.SealFile)); err != nil {
		t.Fatal(err)
	}
}

// storeFiles returns the files of a store that hold its data.
func storeFiles(t *testing.T, dir string) (names []string) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(dir, memberDir), func(path string, d fs.DirEntry, err error) error {
		if err == nil && (strings.HasSuffix(path, ".wal") || d.Name() == "db") {
			name, _ := filepath.Rel(dir, path)
			names = append(names, name)
		}
		return err
	})
	if err != nil || len(names) < 2 {
		t.Fatalf("%v, %v", names, err)
	}
	return names
}

// copyStore copies a store.
func copyStore(t *testing.T, from string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	mirror(t, from, dir)
	return dir
}

// mirror copies a store without writing space that is allocated and not used, and without its reserve.
func mirror(t *testing.T, from, dir string) {
	t.Helper()
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(from, path)
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(dir, name), 0o700)
		}
		if name == reserveFile {
			return nil // a start makes another
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, name)
		return errors.Join(os.WriteFile(to, bytes.TrimRight(content, "\x00"), 0o600), os.Truncate(to, int64(len(content))))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// outcome opens the store and returns the error, or the number of keys with the right value and with a wrong one.
func outcome(t *testing.T, dir, value string) (err error, right, wrong int) {
	t.Helper()
	s := New(testConfig(dir), testLog(t))
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	select {
	case err := <-done:
		return err, 0, 0
	case <-ready:
	}
	list, err := newClient(t, s).List(t.Context(), "/k/", kubernetes.ListOptions{})
	if err != nil {
		t.Error(err)
	}
	for _, kv := range list.Kvs {
		if string(kv.Value) == strings.Repeat(value, 40) {
			right++
		} else {
			wrong++
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	return nil, right, wrong
}

// TestDamage damages every file of a store in many ways, after an orderly stop and as after a crash. The store never opens
// with missing keys, and its error names the damaged file.
func TestDamage(t *testing.T) {
	whole, foreign := closedStore(t, "x"), closedStore(t, "y")
	other := map[string][]byte{}
	for _, name := range storeFiles(t, foreign) {
		other[filepath.Dir(name)], _ = os.ReadFile(filepath.Join(foreign, name))
	}
	flips := 6
	if long() {
		flips = 40
	}
	if tortured() {
		flips = 200
	}
	damages := map[string]func(name string, content []byte) []byte{
		"missing":   func(string, []byte) []byte { return nil },
		"empty":     func(string, []byte) []byte { return []byte{} },
		"half":      func(_ string, b []byte) []byte { return b[:len(b)/2] },
		"short":     func(_ string, b []byte) []byte { return b[:min(len(b), 5000)] },
		"garbage":   func(_ string, b []byte) []byte { return bytes.Repeat([]byte("garbage "), len(b)/8) },
		"another's": func(name string, _ []byte) []byte { return other[filepath.Dir(name)] },
	}
	for i := range flips {
		r := rand.New(rand.NewPCG(uint64(i), 0))
		damages[fmt.Sprintf("flip %d", i)] = func(name string, b []byte) []byte {
			used := len(bytes.TrimRight(b, "\x00"))
			for range 1 + i%8 {
				b[r.IntN(used)] ^= 1 << r.IntN(8)
			}
			return b
		}
	}
	// flipped returns the number of bits that a damage flips. After a crash there are no checksums: a flipped bit inside a
	// key or a value cannot be found, and makes the key another one.
	flipped := func(what string) (n int) {
		if i := 0; strings.HasPrefix(what, "flip ") {
			_, _ = fmt.Sscanf(what, "flip %d", &i)
			n = 1 + i%8
		}
		return n
	}
	refused := map[string]int{}
	for _, sealed := range []bool{true, false} {
		for _, name := range storeFiles(t, whole) {
			for _, what := range slices.Sorted(maps.Keys(damages)) {
				dir := copyStore(t, whole)
				if !sealed {
					breakSeal(t, dir)
				}
				path := filepath.Join(dir, name)
				content, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if content = damages[what](name, content); content == nil {
					err = os.Remove(path)
				} else {
					err = errors.Join(os.WriteFile(path, bytes.TrimRight(content, "\x00"), 0o600), os.Truncate(path, int64(len(content))))
				}
				if err != nil {
					t.Fatal(err)
				}
				err, right, wrong := outcome(t, dir, "x")
				about := fmt.Sprintf("%s, %s, sealed %v", name, what, sealed)
				switch {
				case err == nil && (sealed || right+wrong > damagedKeys || right+wrong < damagedKeys-flipped(what)):
					t.Errorf("%s: it opened, with %d of %d keys", about, right+wrong, damagedKeys)
				case err == nil:
					refused[name+" opened"]++
				case !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), filepath.Join(dir, memberDir)) || strings.Contains(err.Error(), "\n"):
					t.Errorf("%s: %v", about, err)
				default:
					refused[name]++
				}
			}
		}
	}
	t.Log(refused)
}

// TestStoreIsGone: a store that existed and is missing is never created again.
func TestStoreIsGone(t *testing.T) {
	whole := closedStore(t, "x")
	for name, damage := range map[string]func(dir string) error{
		"no member": func(dir string) error { return os.RemoveAll(filepath.Join(dir, memberDir)) },
		"no log":    func(dir string) error { return os.RemoveAll(filepath.Join(dir, memberDir, "wal")) },
		"no log or book": func(dir string) error {
			return errors.Join(os.RemoveAll(filepath.Join(dir, memberDir, "wal")), os.Remove(filepath.Join(dir, peers.BookFile)))
		},
		"an empty log": func(dir string) error {
			return errors.Join(os.RemoveAll(filepath.Join(dir, memberDir, "wal")), os.Mkdir(filepath.Join(dir, memberDir, "wal"), 0o700))
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, join := range []*Admission{nil, {Cluster: "1", Name: "kedge", ID: "1", URL: peers.NewLoopbackURL()}} {
				dir := copyStore(t, whole)
				if err := damage(dir); err != nil {
					t.Fatal(err)
				}
				if join != nil && strings.Contains(name, "book") {
					continue // there is nothing that says that it was there, but for what the caller knows
				}
				cfg := testConfig(dir)
				cfg.Join = join
				err := New(cfg, testLog(t)).Run(t.Context(), func() { t.Error("ready") })
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), filepath.Join(dir, memberDir)) {
					t.Errorf("joins %v: %v", join != nil, err)
				}
			}
		})
	}
}

// TestNewestLogFileIsGone: a crash leaves writes in the newest file of the log that the database does not hold. Without that
// file the store does not open as if there had been none.
func TestNewestLogFileIsGone(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	first := newestLogFile(t, s)
	for i := 0; newestLogFile(t, s) == first; i++ {
		put := fmt.Sprintf("/large/%d", i)
		if _, err := newClient(t, s).Put(t.Context(), put, strings.Repeat("x", 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	fill(t, newClient(t, s), "/k/", 3, "x")
	for deadline := time.Now().Add(20 * time.Second); s.book.Get().Log != newestLogFile(t, s); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the store knows of %s only", s.book.Get().Log)
		}
	}
	dir := copyStore(t, s.cfg.Dir) // as a crash leaves it: nothing is written meanwhile
	newest := filepath.Join(dir, memberDir, "wal", newestLogFile(t, s))
	if err := os.Remove(newest); err != nil {
		t.Fatal(err)
	}
	if err, _, _ := outcome(t, dir, "x"); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), newest+" is missing") {
		t.Errorf("without its newest file: %v", err)
	}
}

func newestLogFile(t *testing.T, s *Store) string {
	t.Helper()
	name, err := integrity.NewestLogFile(s.cfg.Dir)
	if err != nil || name == "" {
		t.Fatalf("%q, %v", name, err)
	}
	return name
}

// TestSealOfEarlierStop: an older kedge, which knows no seals, leaves an outdated one behind.
func TestSealOfEarlierStop(t *testing.T) {
	dir := closedStore(t, "x")
	seal, err := os.ReadFile(filepath.Join(dir, integrity.SealFile))
	if err != nil {
		t.Fatal(err)
	}
	s, stop := start(t, testConfig(dir))
	fill(t, newClient(t, s), "/later/", 3, "z")
	stop()
	breakSeal(t, dir)
	if err := os.WriteFile(filepath.Join(dir, integrity.SealFile), seal, 0o600); err != nil {
		t.Fatal(err)
	}
	if err, right, _ := outcome(t, dir, "x"); err != nil || right != damagedKeys {
		t.Errorf("%d keys, %v", right, err)
	}
}
