package datastore

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/kubernetes"

	"kedge/internal/test/host"
)

// In these tests each member is a process of its own on a host of its own, with the kernel's network between them. The
// process is this test binary. It reads commands from stdin, one per line, and answers each with a line on stdout, when it has the
// answer. Both begin with the number of the command.

const memberConfig = "config.json"

// runMember runs such a process.
func runMember() int {
	data, err := os.ReadFile(filepath.Join(os.Getenv(childDir), memberConfig))
	if err != nil {
		panic(err)
	}
	var cfg Config
	if err := json.Unmarshal(data, &cfg); err != nil {
		panic(err)
	}
	s := New(cfg, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	ctx, cancel := context.WithCancel(context.Background())
	out := &syncedPrinter{}
	go func() {
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			words := strings.Fields(lines.Text())
			go func() {
				answer, err := s.runCommand(words[1:])
				if err != nil {
					answer = "error " + strings.ReplaceAll(err.Error(), "\n", "; ")
				}
				out.printf("%s %s\n", words[0], answer)
			}()
		}
		cancel() // the test has ended, or wants this process to
	}()
	if err := s.Run(ctx, func() {}); err != nil {
		fmt.Fprintln(os.Stderr, "Run:", err)
		return childFailed
	}
	return 0
}

func (s *Store) runCommand(words []string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if answer, known, err := s.runClientCommand(ctx, words); known {
		return answer, err
	}
	switch words[0] {
	case "check":
		return "ok", s.Check(ctx)
	case "leads":
		now, _ := s.Leadership()
		return fmt.Sprint(now.Leading), nil
	case "leadership": // the leader and the term, by what this member knows
		now, _ := s.Leadership()
		return fmt.Sprintf("%s %d", now.Leader, now.Term), nil
	case "admit":
		a, err := s.Admit(ctx, words[1], []netip.AddrPort{netip.MustParseAddrPort(words[2])})
		if err != nil {
			return "", err
		}
		data, err := json.Marshal(a)
		return string(data), err
	case "voters":
		members, err := s.Members(ctx)
		n := 0
		for _, m := range members {
			if !m.Learner {
				n++
			}
		}
		return fmt.Sprint(n), err
	case "move":
		s.SetAddresses([]netip.Addr{netip.MustParseAddr(words[1])})
		return "ok", nil
	}
	c, err := s.NewClient()
	if err != nil {
		return "", err
	}
	defer c.Close()
	if words[0] == "put" {
		_, err := c.Put(ctx, words[1], words[2])
		return "ok", err
	}
	got, err := c.Kubernetes.Get(ctx, words[1], kubernetes.GetOptions{})
	if err != nil {
		return "", err
	}
	if got.KV == nil {
		return "", errors.New("no such key")
	}
	return string(got.KV.Value), nil
}

// machine is a host with its member.
type machine struct {
	t    *testing.T
	host *host.Host
	at   netip.Prefix
	dir  string
	cfg  Config

	environ []string // for the process, besides this one's
	command *exec.Cmd
	in      io.WriteCloser
	readers sync.WaitGroup // of its answers

	mu      sync.Mutex // guards the fields below
	asked   int
	answers map[string]chan string // of the commands that wait for one; nil once the process has ended

	said bytes.Buffer // on stderr since the last start; complete when the process has ended
}

func (m *machine) start() {
	m.t.Helper()
	m.said.Reset()
	data, err := json.Marshal(m.cfg)
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(m.dir, memberConfig), data, 0o600); err != nil {
		m.t.Fatal(err)
	}
	m.command = exec.Command(os.Args[0])
	m.command.Env = append(os.Environ(), childRole+"="+roleMember, childDir+"="+m.dir)
	m.command.Env = append(m.command.Env, m.environ...)
	m.command.Stderr = io.MultiWriter(testWriter{m.t}, &m.said)
	if m.in, err = m.command.StdinPipe(); err != nil {
		m.t.Fatal(err)
	}
	stdout, err := m.command.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := m.host.Start(m.command); err != nil {
		m.t.Fatal(err)
	}
	m.mu.Lock()
	m.answers = map[string]chan string{}
	m.mu.Unlock()
	m.t.Cleanup(m.kill)
	m.readers.Go(func() {
		for s := bufio.NewScanner(stdout); s.Scan(); {
			number, answer, _ := strings.Cut(s.Text(), " ")
			m.mu.Lock()
			if to := m.answers[number]; to != nil {
				to <- answer
			}
			m.mu.Unlock()
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, to := range m.answers {
			close(to)
		}
		m.answers = nil
	})
}

func (m *machine) kill() {
	if m.command == nil {
		return
	}
	_ = m.command.Process.Kill()
	m.readers.Wait()
	_ = m.command.Wait()
	m.command = nil
}

// stop ends the process in order.
func (m *machine) stop() {
	m.t.Helper()
	_ = m.in.Close()
	m.readers.Wait()
	if err := m.command.Wait(); err != nil {
		m.t.Errorf("%s: %v", m.cfg.MemberName, err)
	}
	m.command = nil
}

// errEnded means that the process of a machine has ended.
var errEnded = errors.New("the process has ended")

func (m *machine) ask(line string) (string, error) {
	m.mu.Lock()
	if m.answers == nil {
		m.mu.Unlock()
		return "", errEnded
	}
	m.asked++
	number, answers := fmt.Sprint(m.asked), make(chan string, 1)
	m.answers[number] = answers
	_, err := fmt.Fprintln(m.in, number+" "+line)
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		delete(m.answers, number)
	}()
	if err != nil {
		return "", fmt.Errorf("%w: %w", errEnded, err)
	}
	select {
	case answer, ok := <-answers:
		if !ok {
			return "", errEnded
		}
		if why, failed := strings.CutPrefix(answer, "error "); failed {
			return "", errors.New(why)
		}
		return answer, nil
	case <-time.After(30 * time.Second):
		return "", errors.New("no answer")
	}
}

// await repeats a command until its answer is the wanted one, and returns the time that took.
func (m *machine) await(line, want string) time.Duration {
	m.t.Helper()
	began := time.Now()
	for {
		got, err := m.ask(line)
		if err == nil && got == want {
			return time.Since(began)
		}
		if time.Since(began) > 60*time.Second {
			m.t.Fatalf("%s: %s: %q, %v, want %q", m.cfg.MemberName, line, got, err, want)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// renumber changes the address of the machine. If tell is set, it tells the member.
func (m *machine) renumber(to netip.Prefix, tell bool) {
	m.t.Helper()
	if err := errors.Join(m.host.DelAddr(m.at), m.host.AddAddr(to)); err != nil {
		m.t.Fatal(err)
	}
	m.at = to
	m.cfg.Peer.Addresses = []netip.Addr{to.Addr()}
	if tell {
		if _, err := m.ask("move " + to.Addr().String()); err != nil {
			m.t.Fatal(err)
		}
	}
}

// machines makes a LAN of hosts with these addresses, and a cluster of their members.
func machines(t *testing.T, addresses ...string) []*machine {
	t.Helper()
	return machinesWith(t, func(*Config) {}, addresses...)
}

// machinesWith makes machines whose members have other settings.
func machinesWith(t *testing.T, set func(*Config), addresses ...string) []*machine {
	t.Helper()
	host.RequireRoot(t)
	lan, err := host.NewLAN()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lan.Close(); err != nil {
			t.Error(err)
		}
	})
	c := newTestCluster(t)
	var all []*machine
	for i, address := range addresses {
		at := netip.MustParsePrefix(address)
		name := string(rune('a' + i))
		host, err := lan.Host(name, at)
		if err != nil {
			t.Fatal(err)
		}
		m := &machine{t: t, host: host, at: at, dir: t.TempDir()}
		m.cfg = testConfig(filepath.Join(m.dir, "store"))
		m.cfg.MemberName = name
		m.cfg.Peer = c.peerConfig(name)
		m.cfg.Peer.Port = 2380
		m.cfg.Peer.Addresses = []netip.Addr{at.Addr()}
		set(&m.cfg)
		if i > 0 {
			m.admit(all[0])
		}
		m.start()
		m.await("check", "ok")
		all = append(all, m)
	}
	all[0].await("voters", fmt.Sprint(len(all)))
	return all
}

// admit has a member of the cluster admit the machine. It retries, because a busy machine may take its time.
func (m *machine) admit(via *machine) {
	m.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		answer, err := via.ask(fmt.Sprintf("admit %s %v", m.cfg.MemberName, netip.AddrPortFrom(m.at.Addr(), m.cfg.Peer.Port)))
		if err == nil {
			m.cfg.Join = admission(m.t, answer)
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatal(err)
		}
	}
}

// admission decodes the answer of the command "admit".
func admission(t *testing.T, answer string) *Admission {
	t.Helper()
	a := new(Admission)
	if err := json.Unmarshal([]byte(answer), a); err != nil {
		t.Fatal(err)
	}
	return a
}

// agree checks that all members hold the same.
func agree(t *testing.T, about string, all []*machine) {
	t.Helper()
	revision, err := all[0].ask("revision")
	if err != nil {
		t.Fatalf("%s: %v", about, err)
	}
	digests := map[string][]string{}
	for _, m := range all {
		digest, err := m.ask("digest " + revision)
		if err != nil {
			t.Fatalf("%s: %s: %v", about, m.cfg.MemberName, err)
		}
		digests[digest] = append(digests[digest], m.cfg.MemberName)
	}
	if len(digests) > 1 {
		t.Errorf("%s: the members differ at revision %s: %v", about, revision, digests)
	}
}

func leaderOf(t *testing.T, all []*machine) *machine {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		for _, m := range all {
			if m.command == nil {
				continue
			}
			if leads, err := m.ask("leads"); err == nil && leads == "true" {
				return m
			}
		}
	}
	t.Fatal("no leader")
	return nil
}

// The leader is killed, and then cut off. The others go on.
func TestMachinesLoseTheirLeader(t *testing.T) {
	requireLong(t)
	t.Parallel()
	all := machines(t, "10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24")
	others := func(m *machine) []*machine {
		var out []*machine
		for _, o := range all {
			if o != m {
				out = append(out, o)
			}
		}
		return out
	}
	dead := leaderOf(t, all)
	dead.kill()
	t.Logf("a write after a kill took %v", others(dead)[0].await("put /a 1", "ok").Round(time.Millisecond))
	leaderOf(t, others(dead))
	dead.cfg.Join = nil
	dead.start()
	dead.await("get /a", "1")

	cut := leaderOf(t, all)
	if err := cut.host.Cut(); err != nil {
		t.Fatal(err)
	}
	t.Logf("a write after a cut took %v", others(cut)[0].await("put /a 2", "ok").Round(time.Millisecond))
	leaderOf(t, others(cut))
	if err := cut.host.Restore(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the member was back after %v", cut.await("get /a", "2").Round(time.Millisecond))
}

// All machines move to another network at once: no majority exists that could agree on anything, and every known address is
// wrong.
func TestMachinesMoveAtOnce(t *testing.T) {
	requireLong(t)
	t.Parallel()
	for _, tc := range []struct {
		name string
		to   [3]string
		tell bool // the members are told of their own new addresses
		off  bool // they move while they are off
	}{
		{name: "told", to: [3]string{"172.16.5.11/24", "172.16.5.12/24", "172.16.5.13/24"}, tell: true},
		{name: "not told", to: [3]string{"172.16.6.11/24", "172.16.6.12/24", "172.16.6.13/24"}},
		{name: "to IPv6", to: [3]string{"fd00:5::11/64", "fd00:5::12/64", "fd00:5::13/64"}, tell: true},
		{name: "while off", to: [3]string{"172.16.7.11/24", "172.16.7.12/24", "172.16.7.13/24"}, off: true},
		// Each machine gets the address of another one.
		{name: "around", to: [3]string{"10.0.0.2/24", "10.0.0.3/24", "10.0.0.1/24"}, off: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			all := machines(t, "10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24")
			all[0].await("put /a 1", "ok")
			if tc.off {
				for _, m := range all {
					m.kill()
					m.cfg.Join = nil
				}
			}
			for i, m := range all {
				m.renumber(netip.MustParsePrefix(tc.to[i]), tc.tell)
			}
			began := time.Now()
			if tc.off {
				for _, m := range all {
					m.start()
				}
			}
			for _, m := range all {
				m.await("check", "ok")
			}
			t.Logf("all Checks succeeded after %v", time.Since(began).Round(time.Millisecond))
			all[1].await("put /a 2", "ok")
			all[2].await("get /a", "2")
		})
	}
}

// Two members find each other first and have a majority. The third must be found all the same.
func TestMachinesMoveOneLate(t *testing.T) {
	requireLong(t)
	t.Parallel()
	all := machines(t, "10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24")
	late := all[2]
	if err := late.host.Cut(); err != nil {
		t.Fatal(err)
	}
	for i, m := range all {
		m.renumber(netip.MustParsePrefix(fmt.Sprintf("172.16.8.%d/24", 11+i)), true)
	}
	for _, m := range all[:2] {
		m.await("check", "ok")
	}
	if err := late.host.Restore(); err != nil {
		t.Fatal(err)
	}
	t.Logf("the third was back after %v", late.await("check", "ok").Round(time.Millisecond))
}
