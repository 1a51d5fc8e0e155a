package snapshots

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/datastore"
	"kedge/server/snapshots/archive"
)

// Flags of TestSnapshotFigures. With -short there is one small database, and a quarter of the time before the snapshot.
var (
	figuresBefore = flag.Duration("figures.before", 20*time.Second, "TestSnapshotFigures: how long writes are measured before each snapshot")
	figuresSizes  = flag.String("figures.sizes", "100,1000", "TestSnapshotFigures: the sizes of the databases, in MB")
	figuresRate   = flag.Int("figures.rate", 100, "TestSnapshotFigures: writes per second")
	figuresJSON   = flag.String("figures.json", "", "TestSnapshotFigures: write all figures as JSON to this file, an absolute path")
)

const (
	figuresRole   = "KEDGE_SNAPSHOTS_FIGURES" // what a process of the test does; it is this test binary
	figuresResult = "result.json"             // its result, in its directory
	collectAt     = 30                        // percent of garbage, as in kedge (internal/footprint)
)

// snapshotFigures are the figures of one database.
type snapshotFigures struct {
	Database, Archive int64 // bytes

	Save, Copy, Pack time.Duration // all of it; until the database is copied and checked; until the archive is written and checked
	IdleMemory       peaks         // before, with the writes
	SaveMemory       peaks
	Before           latencies // of writes
	DuringCopy       latencies
	DuringPack       latencies
	During           latencies
	SaveCPU          float64 // seconds

	Restore, Open time.Duration // until the server's files are in place; until the store serves again
	RestoreMemory peaks
}

type latencies struct {
	Count              int
	P50, P99, Greatest time.Duration
}

// peaks is the greatest memory of a process, above what it had.
type peaks struct{ Had, Anonymous, Files int64 }

// TestSnapshotFigures measures a snapshot of databases of 100 MB and 1 GB while objects are written at a constant rate,
// what those writes notice, and the restore: make bench-store. docs/performance.md has the figures. It asserts nothing.
func TestSnapshotFigures(t *testing.T) {
	if role := os.Getenv(figuresRole); role != "" {
		runFigures(t, strings.Fields(role))
		return
	}
	if os.Getenv("KEDGE_BENCH") == "" {
		t.Skip("measures; run it with make bench-store")
	}
	sizes := strings.Split(*figuresSizes, ",")
	if testing.Short() {
		sizes = []string{"50"}
	}
	var all []snapshotFigures
	for _, megabytes := range sizes {
		f := snapshotFigures{}
		dir := t.TempDir()
		child(t, &f, "fill", dir, megabytes)
		child(t, &f, "save", dir)
		child(t, &f, "restore", dir)
		all = append(all, f)
	}
	reportFigures(t, all)
	if *figuresJSON == "" {
		return
	}
	data, err := json.MarshalIndent(all, "", "  ")
	if err == nil {
		err = os.WriteFile(*figuresJSON, append(data, '\n'), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// child runs a role in a process of its own, whose memory is measured, and adds what it has measured to f.
func child(t *testing.T, f *snapshotFigures, role, dir string, more ...string) {
	t.Helper()
	before := *figuresBefore
	if testing.Short() {
		before /= 4
	}
	c := exec.Command(os.Args[0], "-test.run=^TestSnapshotFigures$", "-test.timeout=9m", "-figures.before="+before.String(), "-figures.rate="+strconv.Itoa(*figuresRate))
	c.Env = append(os.Environ(), figuresRole+"="+strings.Join(append([]string{role, dir}, more...), " "))
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", role, err, out)
	}
	data, err := os.ReadFile(filepath.Join(dir, figuresResult))
	if err == nil {
		err = json.Unmarshal(data, f)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// runFigures is such a process.
func runFigures(t *testing.T, role []string) {
	s := &site{T: t, dataDir: role[1], node: "a", secrets: fake.NewClientset()}
	f := snapshotFigures{}
	if role[0] != "fill" {
		data, err := os.ReadFile(filepath.Join(s.dataDir, figuresResult))
		if err == nil {
			err = json.Unmarshal(data, &f)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	switch role[0] {
	case "fill":
		s.prepare(false)
		megabytes, err := strconv.Atoi(role[2])
		if err != nil {
			t.Fatal(err)
		}
		s.fillTo(int64(megabytes) * 1e6)
	case "save":
		s.measureSave(&f)
	case "restore":
		s.measureRestore(&f)
	}
	data, err := json.Marshal(f)
	if err == nil {
		err = os.WriteFile(filepath.Join(s.dataDir, figuresResult), data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// fillTo writes objects until the database has a size.
func (s *site) fillTo(size int64) {
	stop := s.run()
	defer stop()
	c, err := s.store.NewClient()
	if err != nil {
		s.Fatal(err)
	}
	defer c.Close()
	for n := 0; ; {
		var group sync.WaitGroup
		for range 8 {
			from := n
			n += 200
			group.Go(func() {
				var ops []clientv3.Op
				for i := from; i < from+200; i++ {
					key, value := object(i)
					ops = append(ops, clientv3.OpPut(key, string(value)))
					if len(ops) == 100 {
						if _, err := c.Txn(s.Context()).Then(ops...).Commit(); err != nil {
							s.Error(err)
						}
						ops = nil
					}
				}
			})
		}
		group.Wait()
		status, err := c.Status(s.Context(), datastore.Endpoint)
		if err != nil || s.Failed() {
			s.Fatal(err)
		}
		if status.DbSize >= size {
			return
		}
	}
}

// object returns an object as the API server stores it: one in five is a Secret, which is encrypted, the others are pods.
func object(i int) (key string, value []byte) {
	if i%5 == 0 {
		value := make([]byte, 1200)
		for j := range value {
			value[j] = byte(rand.Uint32())
		}
		return fmt.Sprintf("/registry/secrets/ns-%02d/secret-%07d", i%40, i), append([]byte("k8s:enc:secretbox:v1:key1:"), value...)
	}
	uid := func() types.UID {
		return types.UID(fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", rand.Uint32(), rand.N(1<<16), rand.N(1<<12), rand.N(1<<12), rand.N(int64(1)<<48)))
	}
	name, app := fmt.Sprintf("basket-%x-%05d", rand.Uint32(), i), fmt.Sprintf("app-%d", i%100)
	fields := `{"f:metadata":{"f:generateName":{},"f:labels":{".":{},"f:app":{},"f:pod-template-hash":{}},"f:ownerReferences":{".":{},"k:{\"uid\":\"` + string(uid()) +
		`\"}":{}}},"f:spec":{"f:containers":{"k:{\"name\":\"main\"}":{".":{},"f:image":{},"f:imagePullPolicy":{},"f:name":{},"f:resources":{}}},"f:dnsPolicy":{},"f:restartPolicy":{}}}`
	o := corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Name: name, GenerateName: "basket-", Namespace: fmt.Sprintf("ns-%02d", i%40), UID: uid(), CreationTimestamp: metav1.Now(),
			Labels:          map[string]string{"app": app, "pod-template-hash": fmt.Sprintf("%x", rand.Uint32())},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: app, UID: uid()}},
			ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kube-controller-manager", Operation: "Update", APIVersion: "v1", FieldsType: "FieldsV1", FieldsV1: &metav1.FieldsV1{Raw: []byte(fields)}}},
		},
		Spec: corev1.PodSpec{
			NodeName: fmt.Sprintf("node-%d", i%10), ServiceAccountName: "default", RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSClusterFirst,
			Containers: []corev1.Container{{Name: "main", Image: "registry.example.org/shop/" + app + ":v1.2.3", Env: []corev1.EnvVar{{Name: "REGION", Value: "north"}, {Name: "TOKEN", Value: string(uid())}}}},
			Volumes:    []corev1.Volume{{Name: "kube-api-access-" + fmt.Sprintf("%x", rand.N(1<<20)), VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, HostIP: "192.0.2.1", PodIP: fmt.Sprintf("10.42.%d.%d", i%250, i%200),
			Conditions:        []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionTrue}, {Type: corev1.PodReady, Status: corev1.ConditionTrue}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "main", Ready: true, ContainerID: fmt.Sprintf("containerd://%016x%016x%016x", rand.Uint64(), rand.Uint64(), rand.Uint64())}},
		},
	}
	data, err := o.Marshal()
	if err != nil {
		panic(err)
	}
	return "/registry/pods/" + o.Namespace + "/" + name, append([]byte("k8s\x00"), data...)
}

// timedStore notes when the database was copied.
type timedStore struct {
	*datastore.Store
	copied time.Time
}

func (s *timedStore) SaveSnapshot(ctx context.Context, path string) (datastore.Snapshot, error) {
	out, err := s.Store.SaveSnapshot(ctx, path)
	s.copied = time.Now()
	return out, err
}

func (s *site) measureSave(f *snapshotFigures) {
	stop := s.run()
	defer stop()
	debug.SetGCPercent(collectAt)
	w := s.startWriter()
	memory, began := startMemory(s.T), time.Now()
	time.Sleep(*figuresBefore)
	f.IdleMemory = memory.end()

	saver, timed := s.saver(), &timedStore{Store: s.store}
	saver.source = timed
	memory = startMemory(s.T)
	cpu, begin := cpuSeconds(s.T), time.Now()
	saved, err := saver.Save(s.Context(), "figures", nil)
	end := time.Now()
	f.SaveMemory, f.SaveCPU = memory.end(), cpuSeconds(s.T)-cpu
	w.end()
	if err != nil {
		s.Fatal(err)
	}
	f.Database, f.Archive = saved.Header.Database, saved.Size
	f.Save, f.Copy, f.Pack = end.Sub(begin), timed.copied.Sub(begin), end.Sub(timed.copied)
	f.Before, f.During = w.between(began, begin), w.between(begin, end)
	f.DuringCopy, f.DuringPack = w.between(begin, timed.copied), w.between(timed.copied, end)
}

func (s *site) measureRestore(f *snapshotFigures) {
	key, err := archive.ReadKey(s.dir())
	if err != nil {
		s.Fatal(err)
	}
	all, err := filepath.Glob(filepath.Join(s.dataDir, "snapshots", "figures-*"+archive.Suffix))
	if err != nil || len(all) != 1 {
		s.Fatal(all, err)
	}
	debug.SetGCPercent(collectAt)
	memory, begin := startMemory(s.T), time.Now()
	if _, err := s.restore(all[0], key, false); err != nil {
		s.Fatal(err)
	}
	f.Restore = time.Since(begin)
	f.RestoreMemory = memory.end()
	begin = time.Now()
	stop := s.run()
	f.Open = time.Since(begin)
	stop()
}

// writer writes objects at a constant rate, whether earlier writes have ended or not, as the clients of a cluster do.
type writer struct {
	*testing.T

	stop chan struct{}
	done chan struct{}

	mu     sync.Mutex
	writes []write
}

type write struct {
	due  time.Time
	took time.Duration
}

func (s *site) startWriter() *writer {
	w := &writer{T: s.T, stop: make(chan struct{}), done: make(chan struct{})}
	c, err := s.store.NewClient()
	if err != nil {
		s.Fatal(err)
	}
	_, value := object(1)
	go func() {
		defer close(w.done)
		defer c.Close()
		var writes sync.WaitGroup
		defer writes.Wait()
		began := time.Now()
		for n := 1; ; n++ {
			due := began.Add(time.Duration(n) * time.Second / time.Duration(*figuresRate))
			select {
			case <-w.stop:
				return
			case <-time.After(time.Until(due)):
			}
			writes.Go(func() {
				_, err := c.Put(context.Background(), fmt.Sprintf("/registry/leases/written-%03d", n%100), string(value))
				took := time.Since(due)
				w.mu.Lock()
				defer w.mu.Unlock()
				if err != nil {
					w.Error(err)
				}
				w.writes = append(w.writes, write{due, took})
			})
		}
	}()
	return w
}

func (w *writer) end() {
	close(w.stop)
	<-w.done
}

// between returns how long the writes took that were due in a time.
func (w *writer) between(from, to time.Time) latencies {
	var took []time.Duration
	for _, one := range w.writes {
		if !one.due.Before(from) && one.due.Before(to) {
			took = append(took, one.took)
		}
	}
	if len(took) == 0 {
		return latencies{}
	}
	slices.Sort(took)
	at := func(p int) time.Duration { return took[max((len(took)*p+99)/100, 1)-1] }
	return latencies{len(took), at(50), at(99), at(100)}
}

// memoryPeak samples the memory of this process.
type memoryPeak struct {
	*testing.T

	peak peaks
	base [2]int64
	stop chan struct{}
	done chan struct{}
}

func startMemory(t *testing.T) *memoryPeak {
	runtime.GC()
	debug.FreeOSMemory()
	m := &memoryPeak{T: t, stop: make(chan struct{}), done: make(chan struct{})}
	m.base = memoryNow(t)
	m.peak.Had = m.base[0] + m.base[1]
	go func() {
		defer close(m.done)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-m.stop:
				return
			case <-tick.C:
			}
			now := memoryNow(t)
			m.peak.Anonymous, m.peak.Files = max(m.peak.Anonymous, now[0]-m.base[0]), max(m.peak.Files, now[1]-m.base[1])
		}
	}()
	return m
}

func (m *memoryPeak) end() peaks {
	close(m.stop)
	<-m.done
	return m.peak
}

// memoryNow returns the anonymous memory, and the pages of files, in bytes.
func memoryNow(t *testing.T) (out [2]int64) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Error(err)
	}
	for line := range strings.Lines(string(data)) {
		for i, name := range []string{"RssAnon:", "RssFile:"} {
			if words := strings.Fields(line); len(words) == 3 && words[0] == name {
				kilobytes, _ := strconv.ParseInt(words[1], 10, 64)
				out[i] = kilobytes << 10
			}
		}
	}
	return out
}

func cpuSeconds(t *testing.T) float64 {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e9
}

func reportFigures(t *testing.T, all []snapshotFigures) {
	t.Helper()
	load, _ := os.ReadFile("/proc/loadavg")
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	row := func(name string, value func(f snapshotFigures) string) {
		fmt.Fprint(w, name)
		for _, f := range all {
			fmt.Fprint(w, "\t", value(f))
		}
		fmt.Fprintln(w)
	}
	megabytes := func(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
	seconds := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	written := func(l latencies) string {
		ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
		return fmt.Sprintf("%.2f, %.1f, %.1f ms of %d", ms(l.P50), ms(l.P99), ms(l.Greatest), l.Count)
	}
	row("database", func(f snapshotFigures) string { return megabytes(f.Database) })
	row("snapshot", func(f snapshotFigures) string { return megabytes(f.Archive) })
	row("save", func(f snapshotFigures) string { return seconds(f.Save) })
	row("  copy the database and check the copy", func(f snapshotFigures) string { return seconds(f.Copy) })
	row("  pack, encrypt and check it", func(f snapshotFigures) string { return seconds(f.Pack) })
	row("  processor time", func(f snapshotFigures) string { return fmt.Sprintf("%.2f s", f.SaveCPU) })
	memory := func(p peaks) string {
		return fmt.Sprintf("%.1f + %.1f, %.1f of files", float64(p.Had)/1e6, float64(p.Anonymous)/1e6, float64(p.Files)/1e6)
	}
	row("  memory before, MB: least + peak", func(f snapshotFigures) string { return memory(f.IdleMemory) })
	row("  memory meanwhile, MB", func(f snapshotFigures) string { return memory(f.SaveMemory) })
	row("writes before: p50, p99, most", func(f snapshotFigures) string { return written(f.Before) })
	row("writes during the save", func(f snapshotFigures) string { return written(f.During) })
	row("  during the copy", func(f snapshotFigures) string { return written(f.DuringCopy) })
	row("  during the rest", func(f snapshotFigures) string { return written(f.DuringPack) })
	row("restore", func(f snapshotFigures) string { return seconds(f.Restore) })
	row("  memory, MB", func(f snapshotFigures) string { return memory(f.RestoreMemory) })
	row("open the restored store", func(f snapshotFigures) string { return seconds(f.Open) })
	_ = w.Flush()
	t.Logf("%d writes a second, load %s\n%s", *figuresRate, strings.TrimSpace(string(load)), &out)
}
