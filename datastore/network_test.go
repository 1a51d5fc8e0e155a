package datastore

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/test/history"
	"kedge/internal/test/host"
)

// loaded is three machines whose clients never stop: some keep a ledger, and the history of the others is judged in the end.
type loaded struct {
	*testing.T
	all    []*machine
	ledger *ledger
	random *rand.Rand
	loads  int
}

func newLoaded(t *testing.T) *loaded {
	t.Helper()
	return &loaded{T: t, random: seedFor(t), ledger: newLedger(), all: machines(t, "10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24")}
}

// load has clients use the given machines until end is called, which judges what they were told.
func (l *loaded) load(use ...*machine) (h *history.History, end func()) {
	l.loads++
	stop := l.ledger.keepWriting(2, func(client int) asker { return use[client%len(use)] })
	h = history.New()
	for client := range 6 {
		h.Client(func() time.Duration { return 2 * time.Millisecond }, func(n int) {
			m, key := use[(client+n)%len(use)], fmt.Sprintf("/h/%d/%d", l.loads, n%2)
			if n%3 == 0 {
				value := fmt.Sprintf("%d-%d", client, n)
				h.Write(client, key, value, func() error { _, err := m.ask("put " + key + " " + value); return err })
				return
			}
			h.Read(client, key, func() (string, error) {
				value, err := m.ask("get " + key)
				if err != nil && strings.Contains(err.Error(), "no such key") {
					return "", nil
				}
				return value, err
			})
		})
	}
	return h, func() {
		l.Helper()
		stop()
		h.End(l.T)
	}
}

// settle waits until all members are good, and compares them with the ledger and with each other.
func (l *loaded) settle(about string) {
	l.Helper()
	for _, m := range l.all {
		m.await("check", "ok")
		for _, problem := range l.ledger.verify(m) {
			l.Errorf("%s: %s: %s", about, m.cfg.MemberName, problem)
		}
	}
	agree(l.T, about, l.all)
}

// others returns the machines but one.
func (l *loaded) others(m *machine) (out []*machine) {
	for _, o := range l.all {
		if o != m {
			out = append(out, o)
		}
	}
	return out
}

// leadershipOf returns the leader and its term, by what a member knows.
func leadershipOf(t *testing.T, m *machine) (leader string, term int) {
	t.Helper()
	answer, err := m.ask("leadership")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(answer, "%s %d", &leader, &term); err != nil {
		t.Fatalf("%q: %v", answer, err)
	}
	return leader, term
}

// A leader whose process is paused is replaced. When it goes on, it answers nothing that is stale: its clients' reads, which wait
// in its pipe meanwhile, are the first that it sees.
func TestLeaderIsPaused(t *testing.T) {
	requireLong(t)
	t.Parallel()
	pauses := []time.Duration{5 * time.Second}
	if tortured() {
		pauses = append(pauses, 15*time.Second, time.Minute)
	}
	l := newLoaded(t)
	for _, pause := range pauses {
		paused := leaderOf(t, l.all)
		use := l.others(paused)
		h, end := l.load(use...)
		for range 20 {
			if err := l.ledger.write(paused, "/l/paused"); err != nil {
				t.Fatal(err)
			}
		}
		if err := paused.command.Process.Signal(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		until := time.Now().Add(pause)
		leaderOf(t, use)
		for range 20 { // acknowledged while the old leader is away
			if err := l.ledger.write(use[0], "/l/paused"); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(time.Until(until) - 500*time.Millisecond)
		var asked sync.WaitGroup
		asked.Go(func() {
			for range 30 {
				_, _ = l.ledger.read(paused, "/l/paused") // an error is not stale
			}
		})
		for client := range 4 {
			asked.Go(func() {
				for range 30 {
					key := fmt.Sprintf("/h/%d/0", l.loads)
					h.Read(100+client, key, func() (string, error) { return paused.ask("get " + key) })
				}
			})
		}
		time.Sleep(time.Until(until))
		if err := paused.command.Process.Signal(unix.SIGCONT); err != nil {
			t.Fatal(err)
		}
		asked.Wait()
		end()
		l.settle(fmt.Sprintf("after a pause of %v", pause))
	}
}

// cables returns the cables of the machines, which are repaired in the end.
func (l *loaded) cables() map[*machine]*host.Cable {
	all := map[*machine]*host.Cable{}
	for _, m := range l.all {
		c := host.CableOf(m.host)
		all[m] = c
		l.Cleanup(func() {
			if err := c.Repair(); err != nil {
				l.Error(err)
			}
		})
	}
	return all
}

// impair makes a cable bad.
func (l *loaded) impair(c *host.Cable, out, in host.Fault) {
	l.Helper()
	if err := c.Impair(out, in); err != nil {
		l.Fatal(err)
	}
}

// Links that carry only one direction, and links that go up and down: a follower costs the others nothing, and a leader is
// replaced by one that hears and is heard.
func TestOneWayAndFlappingLinks(t *testing.T) {
	requireLong(t)
	t.Parallel()
	lasts := 3 * time.Second
	if tortured() {
		lasts = 20 * time.Second
	}
	l := newLoaded(t)
	cables := l.cables()
	good, deaf := host.Fault{}, host.Fault{Loss: 1}
	for _, tc := range []struct {
		name    string
		out, in host.Fault
		leads   bool
		flaps   bool
	}{
		{name: "a follower is not heard", out: deaf},
		{name: "a follower does not hear", in: deaf},
		{name: "a follower flaps", out: deaf, in: deaf, flaps: true},
		{name: "the leader is not heard", out: deaf, leads: true},
		{name: "the leader does not hear", in: deaf, leads: true},
		{name: "the leader flaps one way", out: deaf, leads: true, flaps: true},
	} {
		bad := leaderOf(t, l.all)
		if !tc.leads {
			bad = l.others(bad)[l.random.IntN(2)]
		}
		use := l.others(bad)
		_, before := leadershipOf(t, use[0])
		_, end := l.load(use...)
		for until := time.Now().Add(lasts); time.Now().Before(until); {
			l.impair(cables[bad], tc.out, tc.in)
			if !tc.flaps {
				time.Sleep(lasts)
				break
			}
			time.Sleep(200 * time.Millisecond)
			l.impair(cables[bad], good, good)
			time.Sleep(200 * time.Millisecond)
		}
		if !tc.flaps {
			leader := leaderOf(t, use)
			for range 5 {
				leader.await("put /during "+strings.ReplaceAll(tc.name, " ", "-"), "ok")
			}
		}
		l.impair(cables[bad], good, good)
		time.Sleep(time.Second) // the clients go on
		end()
		l.settle(tc.name)
		_, after := leadershipOf(t, use[0])
		t.Logf("%s: the term went from %d to %d", tc.name, before, after)
	}
}

// A network that delays, loses, repeats and reorders packets in all directions loses no write and gives no stale answer.
func TestBadNetwork(t *testing.T) {
	requireLong(t)
	t.Parallel()
	lasts := 5 * time.Second
	if tortured() {
		lasts = time.Minute
	}
	l := newLoaded(t)
	cables := l.cables()
	for _, c := range cables {
		bad := host.Fault{Delay: 50 * time.Millisecond, Jitter: 25 * time.Millisecond, Loss: 0.025, Duplicate: 0.01, Reorder: 0.01}
		l.impair(c, bad, bad)
	}
	_, before := leadershipOf(t, l.all[0])
	_, end := l.load(l.all...)
	time.Sleep(lasts)
	for _, c := range cables {
		l.impair(c, host.Fault{}, host.Fault{})
	}
	time.Sleep(time.Second) // the clients go on
	end()
	l.settle("a bad network")
	_, after := leadershipOf(t, l.all[0])
	t.Logf("%d writes, the term went from %d to %d", l.ledger.writes, before, after)
}
