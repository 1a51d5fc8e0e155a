package appliance

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestLargeBundle installs a bundle of 3 GB, and imports its image, with 512 MB of memory.
func TestLargeBundle(t *testing.T) {
	if os.Getenv(longVar) == "" {
		t.Skip("it writes 15 GB; set KEDGE_TEST_LONG=1")
	}
	b := newBundled(t)
	const layers, size = 3, 1 << 30
	writeLayout(t, filepath.Join(b.Dir, "layout"), "example.org/large:1", layers, size)
	b.file(t, "bundle.yaml", "images: [./layout]\n")
	large := filepath.Join(b.Dir, "large")
	group, killed, peak := memoryLimit(t, b.Name, 512<<20)
	b.World.Cgroups = []string{group}
	b.run(t, harness.Binary(), 0, "bundle", "create", "-f", b.Dir+"/bundle.yaml", "-o", large)
	if err := os.RemoveAll(filepath.Join(b.Dir, "layout")); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(large); err != nil || st.Size() < layers*size {
		t.Fatalf("the bundle: %v, %v", st, err)
	}
	out := b.run(t, large, 0, b.install()...)
	if !strings.Contains(out, "kedge: copying the contents of the bundle: ") {
		t.Errorf("no progress is shown:\n%s", out)
	}
	if err := os.Remove(large); err != nil { // a USB stick that is taken out again
		t.Fatal(err)
	}
	b.start(t)
	harness.Eventually(t, 10*time.Minute, func() error {
		out, err := b.Run("images", "ls", "--run-dir="+b.RunDir())
		if err != nil || !strings.Contains(pinnedLine(out, "example.org/large:1"), "pinned") {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
	if lines := b.LogLines(t, "importing images"); len(lines) < 2 {
		t.Errorf("the import says its progress: %q", lines)
	}
	if n := killed(); n != 0 {
		t.Errorf("%d processes were killed because memory was short", n)
	}
	if n := peak(); n < 100<<20 {
		t.Errorf("the control group had at most %d bytes: kedge did not run in it", n)
	}
	if err := b.Signal(syscall.SIGTERM, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	b.World.Cgroups = nil
}

// memoryLimit makes a control group with a limit of memory, and returns its folder, and functions that return how many of its
// processes were killed, and how many bytes it had at most.
func memoryLimit(t *testing.T, name string, bytes int) (dir string, killed, peak func() int) {
	t.Helper()
	base, limit, events, most := "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control", "memory.max_usage_in_bytes"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		base, limit, events, most = "/sys/fs/cgroup", "memory.max", "memory.events", "memory.peak"
	}
	dir = filepath.Join(base, "test-"+name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		harness.SkipLacking(t, "control groups: %v", err)
	}
	t.Cleanup(func() {
		harness.Eventually(t, 30*time.Second, func() error { return os.Remove(dir) }) // its processes end
	})
	if err := os.WriteFile(filepath.Join(dir, limit), []byte(strconv.Itoa(bytes)), 0); err != nil {
		harness.SkipLacking(t, "control groups of memory: %v", err)
	}
	number := func(file, pattern string) func() int {
		return func() int {
			data, err := os.ReadFile(filepath.Join(dir, file))
			found := regexp.MustCompile(pattern).FindSubmatch(data)
			if err != nil || found == nil {
				t.Fatalf("%s: %v\n%s", file, err, data)
			}
			n, err := strconv.Atoi(string(found[1]))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	return dir, number(events, `(?m)^oom_kill (\d+)$`), number(most, `^(\d+)`)
}

// writeLayout writes an OCI layout with an image whose layers have one file of random bytes each.
func writeLayout(t *testing.T, dir, name string, layers int, size int64) {
	t.Helper()
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	type descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int64             `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	put := func(mediaType string, write func(w io.Writer) error) descriptor {
		t.Helper()
		f, err := os.CreateTemp(blobs, "new")
		if err != nil {
			t.Fatal(err)
		}
		h := sha256.New()
		if err := write(io.MultiWriter(f, h)); err != nil {
			t.Fatal(err)
		}
		sum := hex.EncodeToString(h.Sum(nil))
		st, err := f.Stat()
		if err == nil {
			err = os.Rename(f.Name(), filepath.Join(blobs, sum))
		}
		if err != nil || f.Close() != nil {
			t.Fatal(err)
		}
		return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: st.Size()}
	}
	object := func(mediaType string, v any) descriptor {
		return put(mediaType, func(w io.Writer) error { return json.NewEncoder(w).Encode(v) })
	}
	var list []descriptor
	var sums []string
	for i := range layers {
		d := put("application/vnd.oci.image.layer.v1.tar", func(w io.Writer) error {
			tw := tar.NewWriter(w)
			if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprint("file", i), Mode: 0o644, Size: size}); err != nil {
				return err
			}
			random := rand.NewChaCha8(sha256.Sum256(fmt.Append(nil, name, i)))
			if _, err := io.CopyN(tw, random, size); err != nil {
				return err
			}
			return tw.Close()
		})
		list, sums = append(list, d), append(sums, d.Digest)
	}
	config := object("application/vnd.oci.image.config.v1+json", map[string]any{
		"os": "linux", "architecture": goruntime.GOARCH, "rootfs": map[string]any{"type": "layers", "diff_ids": sums}, "config": map[string]any{},
	})
	manifest := object("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": list,
	})
	manifest.Annotations = map[string]string{"io.containerd.image.name": name}
	for name, v := range map[string]any{"oci-layout": map[string]string{"imageLayoutVersion": "1.0.0"}, "index.json": map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}}} {
		data, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
