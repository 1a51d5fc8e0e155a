package datastore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/datastore/blockrecorder"
)

// ownDisk is a recorded disk with a file system, which this process must not use itself.
type ownDisk struct {
	*blockrecorder.Disk
	mountpoint string
}

// diskOfMember is the size of such a disk. The store refuses writes with less than 32 MiB free.
const diskOfMember = 192 << 20

func newOwnDisk(t *testing.T) *ownDisk {
	t.Helper()
	dir := t.TempDir()
	disk, err := blockrecorder.New(dir, make([]byte, diskOfMember))
	if err != nil {
		t.Fatal(err)
	}
	d := &ownDisk{Disk: disk, mountpoint: filepath.Join(dir, "mounted")}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(d.mountpoint, 0), disk.Close()); err != nil {
			t.Error(err)
		}
	})
	out, err := exec.Command("mkfs.ext4", "-q", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", "-O", "^resize_inode", disk.Device).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	if err := errors.Join(os.Mkdir(d.mountpoint, 0o700), unix.Mount(disk.Device, d.mountpoint, "ext4", unix.MS_NOATIME, "")); err != nil {
		t.Fatal(err)
	}
	return d
}

// remount mounts the file system anew. Nothing may use it.
func (d *ownDisk) remount(t *testing.T) {
	t.Helper()
	if err := errors.Join(unix.Unmount(d.mountpoint, 0), unix.Mount(d.Device, d.mountpoint, "ext4", unix.MS_NOATIME, "")); err != nil {
		t.Fatal(err)
	}
}

// fill fills the file system with a file until few bytes are free, and returns what removes it again.
func (d *ownDisk) fill(t *testing.T) (empty func()) {
	t.Helper()
	path := filepath.Join(d.mountpoint, "filler")
	out, err := exec.Command("sh", "-c", "dd if=/dev/zero of="+path+" bs=64k 2>&1; sync -f "+path).CombinedOutput()
	if err == nil && !strings.Contains(string(out), "No space left") {
		t.Fatalf("the disk is not full: %s", out)
	}
	return func() {
		if out, err := exec.Command("rm", path).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

// TestOneOfThreeHasABadDisk gives one of three members a slow disk, one that stalls, one that fails, and one that is full. The
// others go on, whether it led or followed; and it is whole again afterwards.
func TestOneOfThreeHasABadDisk(t *testing.T) {
	requireRecorder(t)
	requireLong(t)
	lasts := 2 * time.Second
	if tortured() {
		lasts = 30 * time.Second
	}
	disks := map[string]*ownDisk{}
	for _, name := range []string{"a", "b", "c"} {
		disks[name] = newOwnDisk(t)
	}
	l := &loaded{T: t, random: seedFor(t), ledger: newLedger()}
	l.all = machinesWith(t, func(c *Config) { c.Dir = filepath.Join(disks[c.MemberName].mountpoint, "store") },
		"10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24")
	for _, tc := range []struct {
		name  string
		fault func(m *machine, disk *ownDisk) // returns when the disk is good again
	}{
		{"slow", func(m *machine, disk *ownDisk) {
			random := rand.New(rand.NewPCG(l.random.Uint64(), 0)) // flushes come one at a time
			disk.Slow(func() time.Duration {
				if random.IntN(50) == 0 {
					return 500 * time.Millisecond
				}
				return time.Duration(5+random.IntN(30)) * time.Millisecond
			})
			l.awaitWrites(20)
			time.Sleep(lasts)
			disk.Slow(nil)
		}},
		{"stalled", func(m *machine, disk *ownDisk) {
			resume := disk.Stall()
			defer resume()
			l.awaitWrites(20)
			time.Sleep(lasts)
			l.awaitWrites(20)
		}},
		{"failing", func(m *machine, disk *ownDisk) {
			disk.FailFlush()
			l.awaitEndOf(m)
			l.awaitWrites(20)
			disk.remount(t) // the kernel may have made it read-only; the machine is started anew
			m.cfg.Join = nil
			m.start()
		}},
		{"full", func(m *machine, disk *ownDisk) {
			// The disk fills faster than the store can look, and the others' writes go on: it says that the disk is full, or
			// it ends before it would have to acknowledge what it cannot store.
			empty := disk.fill(t)
			for range 2 { // the second time it starts on the full disk
				ended := l.awaitFull(m)
				l.awaitWrites(20)
				if !ended {
					if _, err := m.ask("put /full x"); err == nil {
						t.Errorf("%s: a member whose disk is full took a write", m.cfg.MemberName)
					}
					m.kill()
				}
				m.cfg.Join = nil
				m.start()
			}
			ended := l.awaitFull(m)
			empty()
			if ended {
				m.start()
			}
		}},
	} {
		for _, leads := range []bool{true, false} {
			bad := leaderOf(t, l.all)
			if !leads {
				bad = l.others(bad)[l.random.IntN(2)]
			}
			about := fmt.Sprintf("%s, leads %v", tc.name, leads)
			t.Log(about)
			_, end := l.load(l.others(bad)...)
			tc.fault(bad, disks[bad.cfg.MemberName])
			bad.await("check", "ok")
			time.Sleep(time.Second) // the clients go on
			end()
			l.settle(about)
		}
	}
}

// awaitWrites waits until the clients of the ledger have written some more.
func (l *loaded) awaitWrites(n int) {
	l.Helper()
	l.ledger.await(l.T, n)
}

// awaitEndOf waits until the process of a machine has ended, and checks that its store has failed.
func (l *loaded) awaitEndOf(m *machine) {
	l.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := m.ask("leadership"); errors.Is(err, errEnded) {
			break
		}
		if time.Now().After(deadline) {
			l.Fatalf("%s does not end", m.cfg.MemberName)
		}
	}
	m.readers.Wait()
	_ = m.command.Wait()
	if code := m.command.ProcessState.ExitCode(); code != childFailed || !strings.Contains(m.said.String(), ErrFailed.Error()) {
		l.Errorf("%s has ended with exit code %d and says %q", m.cfg.MemberName, code, m.said.String())
	}
	m.command = nil
}

// awaitFull waits until a member says that its disk is full, or has ended with a failed write.
func (l *loaded) awaitFull(m *machine) (ended bool) {
	l.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		answer, err := m.ask("check")
		switch {
		case errors.Is(err, errEnded):
			l.awaitEndOf(m)
			return true
		case err != nil && strings.Contains(err.Error(), ErrDiskFull.Error()):
			return false
		case time.Now().After(deadline):
			l.Fatalf("%s: check: %q, %v, want %v", m.cfg.MemberName, answer, err, ErrDiskFull)
		}
	}
}

// TestDiskErrors lets a write or a flush of the disk fail at a random moment. The store does not go on as if nothing had happened,
// and what it has acknowledged is on the disk.
func TestDiskErrors(t *testing.T) {
	requireRecorder(t)
	requireLong(t)
	rounds := 2
	if n, ok := number(t, tortureVar); ok {
		rounds = max(rounds, int(n)/20)
	}
	random := seedFor(t)
	ended := 0
	for round := range rounds {
		s := startPowered(t, nil, "")
		after := 20 + random.IntN(500)
		s.follow("it has written", func() bool { return len(s.acks) > after })
		writes := random.IntN(2) == 0
		if writes {
			s.disk.FailWrite()
		} else {
			s.disk.FailFlush()
		}
		// The kernel may keep the failed write to itself, such as one of the file system's own.
		patience := time.Now().Add(5 * time.Second)
		s.follow("it has noticed the failure", func() bool { return s.end != "" || time.Now().After(patience) })
		if s.end != "" {
			ended++
		} else if !writes {
			t.Errorf("round %d: the store has not noticed a failed flush", round)
		}
		s.stop()
		s.rec = s.disk.Recording()
		for _, tail := range blockrecorder.Tails {
			if r := s.after(t, s.rec.Image(s.rec.Flushes(), tail, random), s.rec.Flushes()); r.bad() {
				t.Errorf("round %d, after %d writes, of data %v, tail %s: %d writes lost, revision reverts: %v, watches %v, %v",
					round, after, writes, tail, r.lost, r.reverts, r.watches, r.failed)
			}
		}
	}
	t.Logf("%d of %d stores have ended", ended, rounds)
}
