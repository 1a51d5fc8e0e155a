package datastore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"golang.org/x/sys/unix"

	"kedge/datastore/blockrecorder"
)

const (
	// tortureVar is the number of power cuts; "make torture" sets it. Without it there are a few.
	tortureVar = "KEDGE_TORTURE"
	// seedVar chooses the cuts of an earlier run, of which the seed was printed. What was written differs from run to run, so a
	// disk on which a store was bad is kept: see "go help testflag" for -artifacts.
	seedVar = "KEDGE_TORTURE_SEED"
	// flushesVar tells the child where the number of flushes is.
	flushesVar = "KEDGE_DATASTORE_TEST_FLUSHES"

	shortCuts    = 8
	longCuts     = 60        // of make test-datastore
	cutsPerRound = 250       // of one recording
	powerDisk    = 256 << 20 // size of the disk, in bytes; most of it is never written
	recordFor    = 3 * time.Second
	powerWriters = 4
	leaseWrites  = 16 // every so many writes one has a lease
)

// poweredConfig is for a store that within seconds does all that the usual one does within an hour: commits, snapshots of raft,
// new segments of the log.
func poweredConfig(dir string) Config {
	c := testConfig(dir)
	c.Alone.BatchInterval, c.Alone.SnapshotCount, c.Alone.SnapshotCatchUp = 150*time.Millisecond, 300, 100
	return c
}

const powerPrefix = "/registry/p/"

func powerKey(writer int) string { return fmt.Sprintf("%s%d", powerPrefix, writer) }

// runPowered is a child that writes to a disk that is recorded, and says with each acknowledged write how many flushes there
// were: the write must be in every state of the disk after so many.
func runPowered() int {
	flushes, err := blockrecorder.OpenCounter(os.Getenv(flushesVar))
	if err != nil {
		panic(err)
	}
	s := New(poweredConfig(os.Getenv(childDir)), slog.New(slog.NewTextHandler(os.Stderr, nil)))
	out := &syncedPrinter{}
	err = s.Run(context.Background(), func() {
		out.printf("ready\n")
		out.printf("identity %d %s\n", flushes.Load(), identity(s))
		powerWatch(s, flushes, out)
		if operation := os.Getenv(operationVar); operation != "" && operation != firstBoot {
			go powerOperation(s, operation, flushes, out)
		}
		for w := range powerWriters {
			go powerWrite(s, w, flushes, out)
		}
		go powerCompact(s, out)
		go powerHealth(s, out)
	})
	out.printf("end %v\n", err)
	if errors.Is(err, ErrFailed) {
		return childFailed
	}
	return 1
}

// powerWrite writes one key for ever as the API server does, by comparing its revision, and events with a lease beside it.
func powerWrite(s *Store, writer int, flushes *blockrecorder.Counter, out *syncedPrinter) {
	ctx := context.Background()
	c, err := s.NewClient()
	if err != nil {
		panic(err)
	}
	random := rand.New(rand.NewPCG(uint64(writer), 0))
	got, err := c.Get(ctx, powerKey(writer), kubernetes.GetOptions{})
	if err != nil {
		panic(err)
	}
	last, revision := sequenceOf(got.KV.GetValue()), got.KV.GetModRevision()
	for i := last + 1; ; i++ {
		value := fmt.Appendf(nil, "%d %s", i, strings.Repeat("x", random.IntN(3000)))
		resp, err := c.OptimisticPut(ctx, powerKey(writer), value, revision, kubernetes.PutOptions{})
		if err != nil || !resp.Succeeded {
			out.printf("error %v\n", err)
			return
		}
		revision = resp.Revision
		out.printf("ack %d %d %d %d\n", writer, i, revision, flushes.Load())
		if i%leaseWrites == 0 {
			lease, err := c.Client.Grant(ctx, 1000)
			if err == nil {
				_, err = c.Client.Put(ctx, fmt.Sprintf("/registry/events/%d/%d", writer, i), "e", clientv3.WithLease(lease.ID))
			}
			if err != nil {
				out.printf("error %v\n", err)
				return
			}
		}
	}
}

// powerCompact compacts the history again and again, as the API server does every five minutes.
func powerCompact(s *Store, out *syncedPrinter) {
	c, err := s.NewClient()
	if err != nil {
		panic(err)
	}
	for range time.Tick(300 * time.Millisecond) {
		got, err := c.Client.Get(context.Background(), "/")
		if err == nil {
			_, err = c.Client.Compact(context.Background(), max(1, got.Header.Revision-50))
		}
		if err != nil && !strings.Contains(err.Error(), "compacted") {
			out.printf("error %v\n", err)
			return
		}
	}
}

// powerHealth says whenever the store's own check has another result.
func powerHealth(s *Store, out *syncedPrinter) {
	was := ""
	for range time.Tick(100 * time.Millisecond) {
		is := "good"
		if s.Check(context.Background()) != nil {
			is = "bad"
		}
		if is != was {
			out.printf("health %s\n", is)
		}
		was = is
	}
}

// powerWatch says what is in the store, and what a watch of it is told from then on, with the number of flushes until then.
func powerWatch(s *Store, flushes *blockrecorder.Counter, out *syncedPrinter) {
	c, err := s.NewClient()
	if err != nil {
		panic(err)
	}
	got, err := c.Client.Get(context.Background(), powerPrefix, clientv3.WithPrefix())
	if err != nil {
		panic(err)
	}
	for _, kv := range got.Kvs {
		out.printf("key %d %v\n", flushes.Load(), change{got.Header.Revision, kv.Version, string(kv.Key)})
	}
	go func() {
		for resp := range c.Watch(context.Background(), powerPrefix, clientv3.WithPrefix(), clientv3.WithRev(got.Header.Revision+1)) {
			if err := resp.Err(); err != nil {
				out.printf("error of a watch: %v\n", err)
			}
			for _, e := range resp.Events {
				out.printf("event %d %v\n", flushes.Load(), changeOf(e))
			}
		}
	}()
}

func sequenceOf(value []byte) int {
	text, _, _ := strings.Cut(string(value), " ")
	n, _ := strconv.Atoi(text) // 0 for a key that is not there
	return n
}

// poweredWrite is a write that a client knows to be stored.
type poweredWrite struct {
	writer, sequence int
	revision         int64
	flushes          int
}

// poweredEvent is what a watch was told; known is a key that was there before.
type poweredEvent struct {
	change
	known   bool
	flushes int
}

// powered is what was recorded of a store, and what its clients were told.
type powered struct {
	rec    blockrecorder.Recording
	acks   []poweredWrite
	events []poweredEvent
	first  int // number of flushes when the store began

	identity   string // of the store, as it was said after so many flushes
	identified int
	operation  string // see powercutoperations_test.go
	operations []poweredOperation
	over       bool // there are no more operations
}

// watchedUntil returns what the watch was told before a flush.
func (p powered) watchedUntil(flushes int) *watched {
	w := newWatched(0)
	for _, e := range p.events {
		switch {
		case e.flushes > flushes:
		case e.known:
			w.last, w.versions[e.key] = e.revision, e.version
		default:
			w.add(e.change)
		}
	}
	return w
}

// poweredStore is a store in a child, on a disk that is recorded.
type poweredStore struct {
	*testing.T
	powered

	disk       *blockrecorder.Disk
	mountpoint string
	child      *exec.Cmd
	lines      <-chan string
	healthy    bool
	end        string // what the store has said at its end
}

// startPowered starts a store on a recorded disk, and waits until it is ready. content is the disk's before, nil for a new file
// system. options are those of the mount.
func startPowered(t *testing.T, content []byte, options string) *poweredStore {
	t.Helper()
	dir := t.TempDir()
	fresh := content == nil
	if fresh {
		content = make([]byte, powerDisk)
	}
	disk, err := blockrecorder.New(dir, content)
	if err != nil {
		t.Fatal(err)
	}
	s := &poweredStore{T: t, disk: disk, mountpoint: filepath.Join(dir, "mounted")}
	t.Cleanup(func() {
		if err := disk.Close(); err != nil {
			t.Error(err)
		}
	})
	if fresh {
		out, err := exec.Command("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-O", "^resize_inode", disk.Device).CombinedOutput()
		if err != nil {
			t.Fatalf("mkfs.ext4: %v: %s", err, out)
		}
	}
	if err := os.Mkdir(s.mountpoint, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(disk.Device, s.mountpoint, "ext4", unix.MS_NOATIME, options); err != nil {
		t.Fatal("mount the recorded disk:", err)
	}
	t.Cleanup(s.stop)
	s.first = int(disk.Flushes())
	t.Setenv(flushesVar, disk.CounterFile)
	s.child, s.lines = startChild(t, rolePowered, filepath.Join(s.mountpoint, "store"))
	s.follow("it is ready and writes", func() bool { return s.healthy && len(s.acks) > 0 })
	return s
}

// follow reads what the store says until enough is true, or it has ended.
func (s *poweredStore) follow(what string, enough func() bool) {
	s.Helper()
	patience := time.After(time.Minute)
	for !enough() {
		select {
		case line, ok := <-s.lines:
			if !ok {
				if s.end == "" {
					s.Fatalf("the store has ended before %s", what)
				}
				return
			}
			s.hear(line)
		case <-time.After(50 * time.Millisecond):
		case <-patience:
			s.Fatalf("a minute has passed before %s", what)
		}
	}
}

func (s *poweredStore) hear(line string) {
	kind, rest, _ := strings.Cut(line, " ")
	switch kind {
	case "ready":
	case "health":
		s.healthy = rest == "good"
	case "end":
		s.end = rest
	case "ack":
		var a poweredWrite
		if _, err := fmt.Sscanf(rest, "%d %d %d %d", &a.writer, &a.sequence, &a.revision, &a.flushes); err != nil {
			s.Fatal(line, err)
		}
		s.acks = append(s.acks, a)
	case "identity":
		if _, err := fmt.Sscanf(rest, "%d %s", &s.identified, &s.identity); err != nil {
			s.Fatal(line, err)
		}
	case "begin":
		begin, _ := strconv.Atoi(rest)
		s.operations = append(s.operations, poweredOperation{begin: begin})
	case "did":
		o := &s.operations[len(s.operations)-1]
		if _, err := fmt.Sscanf(rest, "%d %d %d", &o.end, &o.n, &o.revision); err != nil {
			s.Fatal(line, err)
		}
	case "operations":
		s.over = true
	case "key", "event":
		e := poweredEvent{known: kind == "key"}
		if _, err := fmt.Sscanf(rest, "%d %d %d %s", &e.flushes, &e.revision, &e.version, &e.key); err != nil {
			s.Fatal(line, err)
		}
		s.events = append(s.events, e)
	default:
		s.Logf("the store says %q", line)
	}
}

// stop kills the store, and unmounts its disk.
func (s *poweredStore) stop() {
	if s.child != nil {
		_ = s.child.Process.Kill()
		for line := range s.lines {
			s.hear(line)
		}
		_ = s.child.Wait() // it was killed
		s.child = nil
	}
	if s.mountpoint != "" {
		if err := unix.Unmount(s.mountpoint, 0); err != nil {
			s.Error("unmount the recorded disk:", err)
		}
		s.mountpoint = ""
	}
}

// recordPowered has a store write to a recorded disk for a while, see [startPowered].
func recordPowered(t *testing.T, content []byte, options string) powered {
	t.Helper()
	s := startPowered(t, content, options)
	end := time.Now().Add(recordFor)
	s.follow("its recording is long enough", func() bool { return time.Now().After(end) })
	if s.end != "" {
		t.Fatal("the store has ended: " + s.end)
	}
	s.rec = s.disk.Recording()
	s.stop()
	return s.powered
}

// cutResult is what a store was after a power cut.
type cutResult struct {
	failed  error    // it has not started, or does not take writes
	lost    int      // acknowledged writes that are not there
	reverts bool     // its revision is lower than one that was handed out
	watches []string // what is wrong with the events of a watch that goes on where it was at the cut
	ready   time.Duration
}

func (r cutResult) bad() bool {
	return r.failed != nil || r.lost > 0 || r.reverts || len(r.watches) > 0
}

// after returns what the store is on a disk after a power cut between two flushes.
func (p powered) after(t *testing.T, image blockrecorder.Image, flushes int) (r cutResult) {
	t.Helper()
	newest := map[int]int{}
	var revision int64
	for _, a := range p.acks {
		if a.flushes <= flushes {
			newest[a.writer], revision = max(newest[a.writer], a.sequence), max(revision, a.revision)
		}
	}
	watches := p.watchedUntil(flushes)
	revision = max(revision, watches.last)
	err := onDisk(t, image, func(dir string) error {
		begin := time.Now()
		is := ""
		err := serveOnce(poweredConfig(filepath.Join(dir, "store")), func(s *Store) error {
			r.ready = time.Since(begin)
			if is = identity(s); p.identified <= flushes && is != p.identity {
				return fmt.Errorf("the store is %s, and was %s", is, p.identity)
			}
			return p.compare(t.Context(), s, newest, revision, watches, &r)
		})
		if err != nil || p.operation == "" {
			return err
		}
		if err := p.products(dir, flushes); err != nil {
			return err
		}
		return serveOnce(poweredConfig(filepath.Join(dir, "store")), func(s *Store) error {
			if again := identity(s); again != is {
				return fmt.Errorf("the store was %s at its first start after the cut, and is %s", is, again)
			}
			return nil
		})
	})
	r.failed = err
	return r
}

// compare compares a store with what its clients knew, and writes to it.
func (p powered) compare(ctx context.Context, s *Store, newest map[int]int, revision int64, watches *watched, r *cutResult) error {
	c, err := s.NewClient()
	if err != nil {
		return err
	}
	defer c.Close()
	var now int64
	for w := range powerWriters {
		got, err := c.Get(ctx, powerKey(w), kubernetes.GetOptions{})
		if err != nil {
			return err
		}
		now = got.Revision
		if is := sequenceOf(got.KV.GetValue()); is < newest[w] {
			r.lost += newest[w] - is
		}
	}
	r.reverts = now < revision
	if r.watches, err = resumeWatch(ctx, c, watches); err != nil {
		return err
	}
	_, err = c.Client.Put(ctx, "/after", "the cut")
	return err
}

// resumeWatch lets a watch go on until it has been told of all changes, and returns what is wrong with its events.
func resumeWatch(ctx context.Context, c *kubernetes.Client, w *watched) ([]string, error) {
	got, err := c.Client.Get(ctx, powerPrefix, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	last := int64(0)
	for _, kv := range got.Kvs {
		last = max(last, kv.ModRevision)
	}
	err = w.follow(ctx, c, powerPrefix, last)
	if errors.Is(err, rpctypes.ErrCompacted) {
		return w.problems, nil // its client lists anew
	}
	for _, kv := range got.Kvs {
		if told := w.versions[string(kv.Key)]; told != kv.Version {
			w.problem("%s has version %d, and the watch was told of %d", kv.Key, kv.Version, told)
		}
	}
	return w.problems, err
}

// onDisk calls f with the file system of an image mounted.
func onDisk(t *testing.T, image blockrecorder.Image, f func(dir string) error) (err error) {
	t.Helper()
	dir, err := os.MkdirTemp(t.TempDir(), "cut")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	file, mountpoint := filepath.Join(dir, "disk"), filepath.Join(dir, "mounted")
	if err := errors.Join(image.WriteFile(file), os.Mkdir(mountpoint, 0o700)); err != nil {
		return err
	}
	device, err := blockrecorder.Attach(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, blockrecorder.Detach(device)) }()
	if err := unix.Mount(device, mountpoint, "ext4", unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount the disk after the cut: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(mountpoint, 0)) }()
	return f(mountpoint)
}

// requireRecorder skips the test on a machine that has no recorded disk.
func requireRecorder(t *testing.T) {
	t.Helper()
	if what := blockrecorder.Missing(); what != "" {
		t.Skip("a recorded disk needs " + what)
	}
}

// TestPowerCut cuts the power of a store that is written to, at random flushes, with any part of what was written after them on
// the disk. No acknowledged write is lost, and the store always starts.
func TestPowerCut(t *testing.T) {
	requireRecorder(t)
	cuts := shortCuts
	if long() {
		cuts = longCuts
	}
	if n, ok := number(t, tortureVar); ok {
		cuts = int(n)
	}
	random := seedFor(t)
	var content []byte // of the disk; each round goes on from a state after a cut of the one before
	var table powerTable
	for done := 0; done < cuts; {
		p := recordPowered(t, content, "")
		table.recorded(p)
		n := min(cutsPerRound, cuts-done)
		for range n {
			flushes := p.first + random.IntN(p.rec.Flushes()-p.first+1)
			tail := blockrecorder.Tails[random.IntN(len(blockrecorder.Tails))]
			content = table.cut(t, p, flushes, tail, random)
		}
		done += n
	}
	table.print(t.Output())
}

// TestPowerCutIsNoticed: where flushes do not reach the disk, acknowledged writes are lost, and the test above would see it.
func TestPowerCutIsNoticed(t *testing.T) {
	requireRecorder(t)
	p := recordPowered(t, nil, "nobarrier")
	random := rand.New(rand.NewPCG(1, 0))
	noticed := 0
	for range 6 {
		flushes := p.first + random.IntN(p.rec.Flushes()-p.first+1)
		if r := p.after(t, p.rec.Image(flushes, blockrecorder.Dropped, random), flushes); r.bad() {
			noticed++
		}
	}
	if noticed == 0 {
		t.Errorf("no loss was noticed in six cuts of a disk that ignores flushes; %d writes, %d flushes", len(p.acks), p.rec.Flushes())
	}
}

// TestFlushFails: a store whose disk fails to flush once stops, acknowledges nothing more, and starts again with everything.
func TestFlushFails(t *testing.T) {
	requireRecorder(t)
	random := rand.New(rand.NewPCG(2, 0))
	s := startPowered(t, nil, "")
	s.follow("it has written", func() bool { return len(s.acks) > 200 })
	s.disk.FailFlush()
	at := int(s.disk.Flushes())
	s.follow("it has noticed the failure", func() bool { return s.end != "" })
	for line := range s.lines {
		s.hear(line)
	}
	if err := s.child.Wait(); s.child.ProcessState.ExitCode() != childFailed {
		t.Errorf("the store has ended with %v: %s", err, s.end)
	}
	s.child, s.rec = nil, s.disk.Recording()
	s.stop()
	for _, a := range s.acks {
		if a.flushes > at {
			t.Fatalf("write %d of writer %d was acknowledged after flush %d, and that after flush %d has failed", a.sequence, a.writer, a.flushes, at)
		}
	}
	for _, tail := range blockrecorder.Tails {
		if r := s.after(t, s.rec.Image(at, tail, random), at); r.bad() {
			t.Errorf("tail %s: %d writes lost, revision reverts: %v, %v", tail, r.lost, r.reverts, r.failed)
		}
	}
}

// TestDiskStalls: a store whose disk stalls says so, does not end, and goes on when the disk does.
func TestDiskStalls(t *testing.T) {
	requireRecorder(t)
	s := startPowered(t, nil, "")
	resume := s.disk.Stall()
	t.Cleanup(resume) // before the disk is closed
	s.follow("it reports the stalled disk", func() bool { return !s.healthy })
	written := len(s.acks)
	resume()
	s.follow("it goes on", func() bool { return s.healthy && len(s.acks) > written+100 })
	if s.end != "" {
		t.Error("the store has ended: " + s.end)
	}
}

// powerTable is what many power cuts have done.
type powerTable struct {
	rounds, writes, flushes int
	bytes                   int64
	cuts                    map[blockrecorder.Tail][]cutResult
}

func (b *powerTable) recorded(p powered) {
	b.rounds++
	b.writes += len(p.acks)
	b.flushes += p.rec.Flushes()
	b.bytes += p.rec.Size()
}

// cut cuts the power of a recorded store, and returns the content of the disk after it. A disk with a bad store is kept.
func (b *powerTable) cut(t *testing.T, p powered, flushes int, tail blockrecorder.Tail, random *rand.Rand) []byte {
	t.Helper()
	image := p.rec.Image(flushes, tail, random)
	content := image.Content()
	r := p.after(t, image, flushes)
	if b.add(tail, r); r.bad() {
		kept := filepath.Join(t.ArtifactDir(), fmt.Sprintf("disk-%d-%s.ext4", flushes, tail))
		t.Errorf("cut after %d of %d flushes, tail %s: %d writes lost, revision reverts: %v, watches %v, %v; the disk is %s, %v",
			flushes, p.rec.Flushes(), tail, r.lost, r.reverts, r.watches, r.failed, kept, image.WriteFile(kept))
	}
	return content
}

func (b *powerTable) add(tail blockrecorder.Tail, r cutResult) {
	if b.cuts == nil {
		b.cuts = map[blockrecorder.Tail][]cutResult{}
	}
	b.cuts[tail] = append(b.cuts[tail], r)
}

func (b *powerTable) print(w io.Writer) {
	out := bufio.NewWriter(w)
	defer out.Flush()
	fmt.Fprintf(out, "%d recordings: %d acknowledged writes, %d flushes, %d MiB\n", b.rounds, b.writes, b.flushes, b.bytes>>20)
	fmt.Fprintln(out, "| unflushed writes | power cuts | failed starts | writes lost | revisions that go back | ready, median | slowest |")
	fmt.Fprintln(out, "|---|---|---|---|---|---|---|")
	for _, tail := range blockrecorder.Tails {
		var failed, lost, reverts int
		var ready []time.Duration
		for _, r := range b.cuts[tail] {
			if lost += r.lost; r.failed != nil {
				failed++
			}
			if r.reverts {
				reverts++
			}
			ready = append(ready, r.ready)
		}
		if len(ready) == 0 {
			continue
		}
		slices.Sort(ready)
		fmt.Fprintf(out, "| %s | %d | %d | %d | %d | %v | %v |\n", tail, len(ready), failed, lost, reverts,
			ready[len(ready)/2].Round(time.Millisecond), ready[len(ready)-1].Round(time.Millisecond))
	}
}
