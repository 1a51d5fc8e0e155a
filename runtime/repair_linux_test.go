package runtime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"kedge/internal/test/image"
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
		"metadata flipped":      {0, flipValues(t)},
		"layers empty":          {1, func([]byte) []byte { return []byte{} }},
		"layers missing":        {1, func([]byte) []byte { return nil }},
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
			wantKept := 1
			if damaged := d.damage(data); damaged == nil {
				wantKept, err = 0, os.Remove(file)
			} else {
				err = os.WriteFile(file, damaged, 0o600)
			}
			if err != nil {
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
			if len(kept) != wantKept {
				t.Errorf("kept for study: %v, want %d files", kept, wantKept)
			}
			if log := n.readLog(); strings.Count(log, "containerd's database is damaged") != 1 {
				t.Errorf("the log does not say once that a database is damaged")
			}
			n.stop()
		})
	}
}

// TestImagesComeBack damages the database of a node with images that came by command, of which
// there is no archive in the folder.
func TestImagesComeBack(t *testing.T) {
	n := newNode(t)
	n.start()
	n.expect("imported")
	dir := filepath.Dir(n.cfg.DataDir)
	for _, tag := range []string{"whole", "broken"} {
		file := filepath.Join(dir, tag+".tar")
		img := image.BusyboxImage(t, "carried:"+tag)
		img.Files["/tag"] = image.File{Data: []byte(tag)}
		image.Write(t, file, image.OCI, img)
		if err := ImportImages(t.Context(), n.cfg.Socket(), io.Discard, []string{file}); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"docker.io/library/carried:broken", "docker.io/library/carried:whole"}
	n.wantPinned(want)
	list := map[string]listedImage{}
	for deadline := time.Now().Add(20 * time.Second); len(list) < 4; time.Sleep(50 * time.Millisecond) {
		list, _ = readList(n.cfg.listFile())
		if time.Now().After(deadline) {
			t.Fatalf("the list of images is %v", list)
		}
	}
	n.kill()
	content := filepath.Join(n.cfg.root(), "io.containerd.content.v1.content/blobs/sha256")
	if err := os.Truncate(filepath.Join(content, list[want[0]].Target.Digest.Encoded()), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(databases(n.cfg)[0], bytes.Repeat([]byte{0xa5}, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.expect("imported")
	n.wantPinned(want[1:])
	log := n.readLog()
	if strings.Count(log, "an image was lost with a damaged database") != 1 || !strings.Contains(log, want[0]) {
		t.Error("the log does not say once which image is gone")
	}
	n.withCRI(func(ctx context.Context, c criClient) {
		id := n.runPod(ctx, c, "pod", "carried:whole", "sleep", "3600")
		out, err := c.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"cat", "/tag"}, Timeout: 10})
		if err != nil || string(out.Stdout) != "whole" {
			t.Errorf("the image holds %q, %v", out.GetStdout(), err)
		}
		if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
			t.Error(err)
		}
	})
	if left, _ := filepath.Glob(filepath.Join(n.cfg.DataDir, "containerd-damaged-*", "blobs")); len(left) > 0 {
		t.Errorf("blobs are left in %v", left)
	}
	n.stop()
}

// flipValues returns a damage that leaves the file a sound database, whose containers have
// a value that cannot be decoded.
func flipValues(t *testing.T) func([]byte) []byte {
	return func(data []byte) []byte {
		name := filepath.Join(t.TempDir(), "meta.db")
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bolt.Open(name, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		flipped := 0
		err = db.Update(func(tx *bolt.Tx) error {
			containers := tx.Bucket([]byte("v1")).Bucket([]byte(criNamespace)).Bucket([]byte("containers"))
			return containers.ForEachBucket(func(id []byte) error {
				b := containers.Bucket(id)
				v := bytes.Clone(b.Get([]byte("createdat")))
				v[0] ^= 0xff
				flipped++
				return b.Put([]byte("createdat"), v)
			})
		})
		if err := errors.Join(err, db.Close()); err != nil || flipped == 0 {
			t.Fatalf("flipped %d values: %v", flipped, err)
		}
		if err := checkDatabase(name); err != nil {
			t.Fatalf("the damage is not only one of values: %v", err)
		}
		flippedData, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		return flippedData
	}
}

// TestDamagedPauseImage: what kedge carries in its own program is made again whenever it
// is not there.
func TestDamagedPauseImage(t *testing.T) {
	n := newNode(t)
	n.importImage("busybox:test")
	n.start()
	n.expect("imported")
	n.stop()
	p, err := embeddedPayload()
	if err != nil {
		t.Fatal(err)
	}
	var program bytes.Buffer
	if err := p.program(&program, programPause); err != nil {
		t.Fatal(err)
	}
	pause, err := newPauseImage(program.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	for round, damage := range []func(name string) error{
		os.Remove,
		func(name string) error { return errors.Join(os.Chmod(name, 0o600), os.Truncate(name, 0)) },
	} {
		for _, b := range pause.blobs {
			if err := damage(filepath.Join(n.cfg.root(), "io.containerd.content.v1.content/blobs/sha256", b.desc.Digest.Encoded())); err != nil {
				t.Fatal(err)
			}
		}
		n.start()
		n.expect("imported")
		n.withCRI(func(ctx context.Context, c criClient) {
			n.runPod(ctx, c, "pod", "busybox:test", "sleep", "3600")
			if err := StopAllPods(ctx, n.cfg.Socket()); err != nil {
				t.Error(err)
			}
		})
		n.stop()
		if said := strings.Count(n.readLog(), "damaged or missing files of the pause image"); said != round+1 {
			t.Errorf("round %d: it was said %d times", round, said)
		}
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
