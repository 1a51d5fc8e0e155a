package datastore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
)

// A child is this test binary, started again as one store in a process of its own that can be killed or can fail for good.
// The environment holds its role and directory. It reports events on stdout, one per line.
const (
	childRole = "KEDGE_DATASTORE_TEST_CHILD"
	childDir  = "KEDGE_DATASTORE_TEST_DIR"

	roleWriter  = "writer"  // writes for ever
	roleFull    = "full"    // writes until files may not grow further
	roleFatal   = "fatal"   // logs a fatal message of etcd
	rolePanic   = "panic"   // panics in a call
	roleMember  = "member"  // runs commands; see machines_test.go
	rolePowered = "powered" // writes to a disk that is recorded; see powercut_test.go
	roleFigures = "figures" // is measured; see figureschild_test.go
	childFailed = 3         // exit status of a child whose Run returned ErrFailed
	fileLimit   = 20 << 20  // of roleFull: bbolt grows its file in steps of 16 MiB, and the second is too much
	writers     = 4         // of roleWriter
)

func runChild(role string) int {
	if role == roleMember {
		return runMember()
	}
	switch role {
	case rolePowered:
		return runPowered()
	case roleFigures:
		return runFigures()
	}
	if role == roleFull {
		// The kernel refuses to grow a file beyond this limit, as on a full disk, but for this process only.
		limit := unix.Rlimit{Cur: fileLimit, Max: fileLimit}
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
			panic(err)
		}
	}
	cfg := testConfig(os.Getenv(childDir))
	s := New(cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	out := &syncedPrinter{}
	err := s.Run(context.Background(), func() {
		out.printf("ready\n")
		switch role {
		case roleWriter:
			go childWatch(s, out)
			for w := range writers {
				go childWrite(s, w, 1000, out)
			}
		case roleFull:
			go childWrite(s, 0, 50_000, out)
		case roleFatal:
			go func() {
				s.zap.Error("a mere error")
				s.zap.Fatal("failed to save Raft hard state and entries")
				out.printf("returned from fatal\n")
			}()
		case rolePanic:
			go func() {
				defer func() { out.printf("recovered %v\n", recover()) }()
				_, err := localCall(s.transport.Load(), context.Background(), new(int), func(context.Context, *int) (*int, error) {
					panic("index out of range")
				})
				out.printf("call %v\n", err)
			}()
		}
	})
	out.printf("end %v\n", err)
	if errors.Is(err, ErrFailed) {
		return childFailed
	}
	return 1
}

// childWrite reports every acknowledged write: writer, sequence number, revision.
func childWrite(s *Store, writer, size int, out *syncedPrinter) {
	c, err := s.NewClient()
	if err != nil {
		panic(err)
	}
	value := strings.Repeat("x", size)
	for i := 0; ; i++ {
		resp, err := c.Put(context.Background(), childKey(writer), fmt.Sprintf("%d %s", i, value))
		if err != nil {
			out.printf("error %v\n", err)
			return
		}
		out.printf("ack %d %d %d\n", writer, i, resp.Header.Revision)
	}
}

// childFrom is the revision from which roleWriter watches.
const childFrom = "KEDGE_DATASTORE_TEST_FROM"

// childWatch reports what a watch of all writes is told.
func childWatch(s *Store, out *syncedPrinter) {
	c, err := s.NewClient()
	if err != nil {
		panic(err)
	}
	from, err := strconv.ParseInt(os.Getenv(childFrom), 10, 64)
	if err != nil {
		return // nobody wants to know
	}
	for resp := range c.Watch(context.Background(), "/w/", clientv3.WithPrefix(), clientv3.WithRev(from)) {
		if err := resp.Err(); err != nil {
			out.printf("error of a watch from %d: %v\n", from, err)
		}
		for _, e := range resp.Events {
			out.printf("event %v.\n", changeOf(e))
		}
	}
}

func childKey(writer int) string { return fmt.Sprintf("/w/%d", writer) }

type syncedPrinter struct{ mu sync.Mutex }

func (p *syncedPrinter) printf(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	fmt.Printf(format, args...)
}

// startChild starts a child and sends its events to lines, which is closed when the child has ended.
func startChild(t *testing.T, role, dir string) (command *exec.Cmd, lines <-chan string) {
	t.Helper()
	command = exec.Command(os.Args[0])
	command.Env = append(os.Environ(), childRole+"="+role, childDir+"="+dir)
	command.Stderr = testWriter{t}
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = command.Process.Kill() })
	c := make(chan string, 1000)
	go func() {
		defer close(c)
		for scanner := bufio.NewScanner(stdout); scanner.Scan(); {
			c <- scanner.Text()
		}
	}()
	return command, c
}

// After a fatal message of etcd, the component fails, no code of etcd after the message runs, and the process can stop in
// order.
func TestFatalFailsTheComponent(t *testing.T) {
	for _, tc := range []struct {
		role string
		want []string
	}{
		{roleFatal, []string{"ready", "end the datastore failed: failed to save Raft hard state and entries"}},
		{rolePanic, []string{"ready", "end the datastore failed: panic: index out of range"}},
	} {
		t.Run(tc.role, func(t *testing.T) {
			command, lines := startChild(t, tc.role, t.TempDir())
			var got []string
			for line := range lines {
				got = append(got, line)
			}
			err := command.Wait()
			if command.ProcessState.ExitCode() != childFailed {
				t.Errorf("%v, want exit status %d", err, childFailed)
			}
			output := strings.Join(got, "\n")
			for _, want := range tc.want {
				if !strings.Contains(output, want) {
					t.Errorf("%q is not in the output:\n%s", want, output)
				}
			}
			if strings.Contains(output, "returned from fatal") {
				t.Error("code after a fatal message was run")
			}
		})
	}
}

// When a write to the disk fails, the store stops at once. All acknowledged writes are there after the next start.
func TestWriteErrorFailsTheComponent(t *testing.T) {
	dir := t.TempDir()
	command, lines := startChild(t, roleFull, dir)
	acked := newAcknowledged()
	var end string
	for line := range lines {
		acked.note(t, line)
		if strings.HasPrefix(line, "end ") {
			end = line
		}
	}
	err := command.Wait()
	if command.ProcessState.ExitCode() != childFailed || !strings.Contains(end, unix.EFBIG.Error()) {
		t.Errorf("%v, %q, want exit status %d and the cause", err, end, childFailed)
	}
	if acked.revision < 100 {
		t.Errorf("only %d writes before the limit", acked.revision)
	}
	s, _ := start(t, testConfig(dir))
	acked.check(t, s)
}

// TestKill kills a writing store again and again, at any moment of its life, and looks for its acknowledged writes. It shows
// that the store acknowledges nothing that only memory holds. Whether the disk keeps it takes a power cut to test.
func TestKill(t *testing.T) {
	rounds := 36
	if !long() {
		rounds = 6
	}
	dir := t.TempDir()
	acked := newAcknowledged()
	for round := range rounds {
		t.Setenv(childFrom, fmt.Sprint(acked.watched.last+1))
		command, lines := startChild(t, roleWriter, dir)
		// In a third of the rounds the kill comes while the store opens. In the others there is time to write.
		if round%3 != 0 {
			if line := <-lines; line != "ready" {
				t.Fatalf("round %d: %q", round, line)
			}
		}
		timer := time.AfterFunc(time.Duration(randomMillis(120))*time.Millisecond, func() { _ = command.Process.Kill() })
		for line := range lines {
			if strings.HasPrefix(line, "end ") || strings.HasPrefix(line, "error ") {
				t.Errorf("round %d: %s", round, line)
			}
			acked.note(t, line)
		}
		timer.Stop()
		_ = command.Wait()

		if round%3 == 2 {
			s, stop := start(t, testConfig(dir))
			acked.check(t, s)
			stop()
		}
	}
	if acked.count == 0 {
		t.Error("nothing was written")
	}
	for _, problem := range acked.watched.problems {
		t.Error("watches: " + problem)
	}
	s, _ := start(t, testConfig(dir))
	c := newClient(t, s)
	got, err := c.Client.Get(t.Context(), "/w/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	last := int64(0)
	for _, kv := range got.Kvs {
		last = max(last, kv.ModRevision)
	}
	if err := acked.watched.follow(t.Context(), c, "/w/", last); err != nil {
		t.Error(err)
	}
	for _, kv := range got.Kvs {
		if told := acked.watched.versions[string(kv.Key)]; told != kv.Version {
			t.Errorf("watches were told of %d writes of %s, and it has %d", told, kv.Key, kv.Version)
		}
	}
	t.Logf("%d kills, %d writes, %d events", rounds, acked.count, acked.watched.count)
}

// TestKillDuringCreation kills stores in their first moments. By itself, etcd does not survive all of these kills.
func TestKillDuringCreation(t *testing.T) {
	rounds := 20
	if !long() {
		rounds = 5
	}
	for round := range rounds {
		dir := t.TempDir()
		command, lines := startChild(t, roleWriter, dir)
		timer := time.AfterFunc(time.Duration(5+randomMillis(60))*time.Millisecond, func() { _ = command.Process.Kill() })
		acked := newAcknowledged()
		for line := range lines {
			acked.note(t, line)
		}
		timer.Stop()
		_ = command.Wait()
		s, stop := start(t, testConfig(dir))
		acked.check(t, s)
		stop()
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
}
