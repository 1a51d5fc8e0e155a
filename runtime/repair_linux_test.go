package runtime

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestDamagedRecord damages containerd's databases under a running pod, as a failing
// disk does, and wants a working node again without anybody's help.
func TestDamagedRecord(t *testing.T) {
	damages := map[string]struct {
		database int
		damage   func([]byte) []byte
	}{
		"metadata half written": {0, func(b []byte) []byte { return b[:len(b)/2] }},
		"metadata overwritten":  {0, func(b []byte) []byte { return bytes.Repeat([]byte{0xa5}, len(b)) }},
		"layers empty":          {1, func([]byte) []byte { return nil }},
	}
	for name, d := range damages {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.importImage("busybox:test")
			n.start()
			n.expect("imported")
			var pid int
			n.withCRI(func(ctx context.Context, c criClient) {
				pid = n.pid(ctx, c, n.runPod(ctx, c, "before", "busybox:test", "sleep", "3600"))
			})
			n.kill()

			file := databases(n.cfg)[d.database]
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, d.damage(data), 0o600); err != nil {
				t.Fatal(err)
			}

			n.start()
			n.expect("imported")
			if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
				t.Errorf("process %d of a pod that nobody knows still runs", pid)
			}
			n.withCRI(func(ctx context.Context, c criClient) {
				list, err := c.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
				if err != nil || len(list.Items) > 0 {
					t.Errorf("pods after repair: %v, %v", list, err)
				}
				n.runPod(ctx, c, "after", "busybox:test", "sleep", "3600")
				if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
					t.Error(err)
				}
			})
			kept, _ := filepath.Glob(filepath.Join(n.cfg.DataDir, "containerd-damaged-*", "*.db"))
			if len(kept) != 1 {
				t.Errorf("kept for study: %v, want one file", kept)
			}
			if log := n.readLog(); strings.Count(log, "containerd's database is damaged") != 1 {
				t.Errorf("the log does not say once that a database is damaged")
			}
			n.stop()
		})
	}
}

// TestKillAll ends pods without containerd and leaves images.
func TestKillAll(t *testing.T) {
	n := newNode(t)
	n.importImage("busybox:test")
	n.start()
	n.expect("imported")
	var pid int
	n.withCRI(func(ctx context.Context, c criClient) {
		pid = n.pid(ctx, c, n.runPod(ctx, c, "pod", "busybox:test", "sleep", "3600"))
	})
	log := slog.New(slog.DiscardHandler)
	if err := KillAll(t.Context(), n.cfg, log); err == nil || !strings.Contains(err.Error(), "another process uses") {
		t.Errorf("KillAll beside a running node said %v", err)
	}
	n.kill()
	before := hostState(t)
	for range 2 { // again, as after an interruption
		if err := KillAll(t.Context(), n.cfg, log); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
		t.Errorf("process %d still runs", pid)
	}
	n.compare(before, hostState(t))
	n.start()
	n.expect("imported")
	if strings.Count(n.readLog(), `msg="imported images"`) != 1 {
		t.Error("images were lost with the pods")
	}
	n.withCRI(func(ctx context.Context, c criClient) {
		if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
			t.Error(err)
		}
	})
	n.stop()
}

func TestCheckDatabase(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good.db")
	db, err := bolt.Open(good, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for i := range 50 {
			b, err := tx.CreateBucketIfNotExists(fmt.Appendf(nil, "bucket%d", i%5))
			if err != nil {
				return err
			}
			inner, err := b.CreateBucketIfNotExists([]byte("inner"))
			if err != nil {
				return err
			}
			if err := inner.Put(fmt.Appendf(nil, "key%d", i), bytes.Repeat([]byte("v"), 3000)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkDatabase(good); err != nil {
		t.Errorf("whole file: %v", err)
	}
	if err := checkDatabase(good + ".not"); err != nil {
		t.Errorf("no file: %v", err)
	}
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	// Every length and, page by page, every hole: never a crash of the process. Pages
	// that nothing refers to may be lost without harm, the others may not.
	bad := filepath.Join(t.TempDir(), "bad.db")
	for size := 0; size < len(data)*3/4; size += 1000 {
		if err := os.WriteFile(bad, data[:size], 0o600); err != nil {
			t.Fatal(err)
		}
		if checkDatabase(bad) == nil {
			t.Errorf("a file of %d of %d bytes passes", size, len(data))
		}
	}
	found := 0
	for page := 0; page < len(data); page += 4096 {
		holed := bytes.Clone(data)
		copy(holed[page:], bytes.Repeat([]byte{0xff}, 4096))
		if err := os.WriteFile(bad, holed[:len(data)], 0o600); err != nil {
			t.Fatal(err)
		}
		if checkDatabase(bad) != nil {
			found++
		}
	}
	if found < len(data)/4096/3 {
		t.Errorf("found %d of %d overwritten pages", found, len(data)/4096)
	}
}
