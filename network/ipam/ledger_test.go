package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var (
	rangeV4 = netip.MustParsePrefix("10.42.3.0/28")
	rangeV6 = netip.MustParsePrefix("fd42::/64")
)

func mustOpen(t *testing.T, dir string) *Ledger {
	t.Helper()
	l, err := Open(dir, "boot-1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	l.SetRanges([]netip.Prefix{rangeV4, rangeV6})
	return l
}

func mustAllocate(t *testing.T, l *Ledger, owner string) Lease {
	t.Helper()
	lease, err := l.Allocate(owner, nil)
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

func TestPoolSkipsWhatIsNotForPods(t *testing.T) {
	for _, c := range []struct {
		prefix, first, last string
		size                int
	}{
		{"10.42.0.0/24", "10.42.0.2", "10.42.0.254", 253},
		{"10.42.3.128/25", "10.42.3.130", "10.42.3.254", 125},
		{"10.42.0.0/29", "10.42.0.2", "10.42.0.6", 5},
		{"10.42.0.0/16", "10.42.0.2", "10.42.64.1", maxPool},
		{"10.42.0.0/31", "", "", 0},
		{"fd42::/64", "fd42::2", "fd42::4001", maxPool},
		{"fd42::/120", "fd42::2", "fd42::ff", 254},
		{"fd42::fffe:0:0/126", "fd42::fffe:0:2", "fd42::fffe:0:3", 2},
	} {
		p := newPool(netip.MustParsePrefix(c.prefix), "boot")
		if p.size != c.size {
			t.Errorf("%s: %d addresses, want %d", c.prefix, p.size, c.size)
		}
		if c.size > 0 && (p.addr(0).String() != c.first || p.addr(p.size-1).String() != c.last) {
			t.Errorf("%s: %s to %s, want %s to %s", c.prefix, p.addr(0), p.addr(p.size-1), c.first, c.last)
		}
	}
}

func TestFreedAddressRestsLongest(t *testing.T) {
	l := mustOpen(t, t.TempDir())
	l.SetRanges([]netip.Prefix{rangeV4}) // 13 addresses
	var order []netip.Addr
	for i := range 13 {
		order = append(order, mustAllocate(t, l, fmt.Sprint(i)).Addrs[0])
	}
	if _, err := l.Allocate("one more", nil); !errors.Is(err, ErrExhausted) {
		t.Fatalf("allocation from a full range: %v", err)
	}
	for _, i := range []int{5, 2, 9} {
		if err := l.Release(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	for n, i := range []int{5, 2, 9} {
		if got := mustAllocate(t, l, fmt.Sprint("new", n)).Addrs[0]; got != order[i] {
			t.Errorf("reused %s, want %s, freed before", got, order[i])
		}
	}
}

func TestAllocateAgainGivesTheSame(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir)
	first := mustAllocate(t, l, "a/eth0")
	again, err := l.Allocate("a/eth0", json.RawMessage(`{"x":1}`))
	if err != nil || !slices.Equal(again.Addrs, first.Addrs) {
		t.Fatalf("second allocation: %v %v, first %v", again, err, first)
	}
	l.Close()
	if kept, ok := mustOpen(t, dir).Get("a/eth0"); !ok || string(kept.Note) != `{"x":1}` {
		t.Errorf("after reopening: %v %v", kept, ok)
	}
}

func TestAnotherBootForgets(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir)
	mustAllocate(t, l, "a/eth0")
	l.Close()
	l, err := Open(dir, "boot-2")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if leases := l.Leases(); len(leases) > 0 {
		t.Errorf("leases of another boot: %v", leases)
	}
}

func TestOnlyOneProcess(t *testing.T) {
	dir := t.TempDir()
	mustOpen(t, dir)
	if _, err := Open(dir, "boot-1"); !errors.Is(err, ErrLocked) {
		t.Errorf("second opening: %v, want ErrLocked", err)
	}
}

func TestNoRange(t *testing.T) {
	l := mustOpen(t, t.TempDir())
	l.SetRanges(nil)
	if _, err := l.Allocate("a", nil); !errors.Is(err, ErrNoRange) {
		t.Errorf("allocation without a range: %v", err)
	}
}

func TestDamageIsReportedAndAdoptionHolds(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir)
	a, b := mustAllocate(t, l, "a"), mustAllocate(t, l, "b")
	l.Close()
	path := journalPath(dir)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(text), "\n")
	lines[2] = "garbage\n" // the lease of b
	if err := os.WriteFile(path, []byte(strings.Join(lines, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	l, err = Open(dir, "boot-1")
	if !errors.Is(err, ErrDamaged) {
		t.Fatalf("damaged journal: %v", err)
	}
	defer l.Close()
	l.SetRanges([]netip.Prefix{rangeV4, rangeV6})
	if got, ok := l.Get("a"); !ok || !slices.Equal(got.Addrs, a.Addrs) {
		t.Errorf("lease before the damage: %v", got)
	}
	if err := l.Adopt(Lease{Owner: "b", Addrs: b.Addrs}); err != nil {
		t.Fatal(err)
	}
	if err := l.Adopt(Lease{Owner: "c", Addrs: a.Addrs}); err == nil {
		t.Error("adopted an address that has an owner")
	}
}

// TestFlippedBits: whatever bit of the journal flips, no lease changes, the leases with
// undamaged lines are present, and the damage is reported.
func TestFlippedBits(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir)
	for _, owner := range []string{"a", "b", "c", "d"} {
		mustAllocate(t, l, owner)
	}
	if err := l.Release("c"); err != nil {
		t.Fatal(err)
	}
	want := l.Leases()
	l.Close()
	text, err := os.ReadFile(journalPath(dir))
	if err != nil {
		t.Fatal(err)
	}
	same := func(a, b Lease) bool { return a.Owner == b.Owner && slices.Equal(a.Addrs, b.Addrs) }
	for i := range text {
		bit := i % 8
		harmed := slices.Clone(text)
		harmed[i] ^= 1 << bit
		if err := os.WriteFile(journalPath(dir), harmed, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(dir, "boot-1")
		if l == nil {
			t.Fatal(err)
		}
		got := l.Leases()
		l.Close()
		// A last line without its newline was never acknowledged.
		if !errors.Is(err, ErrDamaged) && i < len(text)-1 && !slices.EqualFunc(got, want, same) {
			t.Fatalf("bit %d of byte %d: leases %v, were %v, and %v", bit, i, got, want, err)
		}
		lost := 0
		for _, w := range want {
			if !slices.ContainsFunc(got, func(g Lease) bool { return same(g, w) }) {
				lost++
			}
		}
		// The lease with the damaged line may be lost, and with a damaged newline two are.
		// A released lease exists again if the line of its release is lost.
		if lost > 2 || len(got)-(len(want)-lost) > 1 {
			t.Fatalf("bit %d of byte %d: leases %v, were %v", bit, i, got, want)
		}
	}
}

// TestOldJournals: versions before checksums wrote the same lines without them.
func TestOldJournals(t *testing.T) {
	const head, a, b = `{"version":1,"boot":"boot-1"}` + "\n", `{"add":{"owner":"a","addrs":["10.42.3.4","fd42::4"]}}` + "\n",
		`{"add":{"owner":"b","addrs":["10.42.3.5","fd42::5"]}}` + "\n"
	for _, c := range []struct {
		name, text string
		want       []string
		damaged    bool
	}{
		{"whole", head + a + b, []string{"a", "b"}, false},
		{"released", head + a + b + `{"del":"a"}` + "\n", []string{"b"}, false},
		{"torn", head + a + b[:20], []string{"a"}, false},
		{"damaged in the middle", head + a + "rubbish\n" + b, []string{"a"}, true},
		{"damaged head", "rubbish\n" + a + b, nil, true},
		{"another boot's", strings.Replace(head, "boot-1", "boot-0", 1) + a, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(journalPath(dir), []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			for range 2 { // it is written anew at the first opening
				l, err := Open(dir, "boot-1")
				if errors.Is(err, ErrDamaged) != c.damaged {
					t.Fatalf("opened with %v", err)
				}
				c.damaged = false
				var got []string
				for _, lease := range l.Leases() {
					got = append(got, lease.Owner)
				}
				l.Close()
				if !slices.Equal(got, c.want) {
					t.Errorf("leases of %v, want %v", got, c.want)
				}
			}
		})
	}
}

// faults makes writes fail: short, and with or without the repair working.
type faults struct {
	rng      *rand.Rand
	armed    bool
	failures int
}

type faultyFile struct {
	file
	*faults
}

var errFault = errors.New("injected fault")

func (f faultyFile) Write(b []byte) (int, error) {
	if f.armed && f.rng.IntN(8) == 0 {
		f.failures++
		n, err := f.file.Write(b[:f.rng.IntN(len(b)+1)])
		return n, errors.Join(err, errFault)
	}
	return f.file.Write(b)
}

func (f faultyFile) Truncate(size int64) error {
	if f.armed && f.rng.IntN(3) == 0 {
		return errFault
	}
	return f.file.Truncate(size)
}

// TestModel runs random operations with crashes and failing writes in between, and compares
// with a model of the acknowledged operations.
func TestModel(t *testing.T) {
	seeds := 25
	if testing.Short() {
		seeds = 10
	}
	for seed := range seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runModel(t, uint64(seed)) })
	}
}

func runModel(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 42))
	dir := t.TempDir()
	broken := &faults{rng: rng}
	create := func(path string) (file, error) {
		f, err := createFile(path)
		return faultyFile{f, broken}, err
	}
	reopen := func() *Ledger {
		broken.armed = false
		l, err := open(dir, "boot-1", create)
		if err != nil {
			t.Fatal(err)
		}
		l.SetRanges([]netip.Prefix{rangeV4, rangeV6})
		broken.armed = true
		return l
	}
	l := reopen()
	defer func() { l.Close() }()

	// have is the acknowledged state of each owner. After an operation that failed, or that
	// a crash interrupted, either outcome is right, until the next operation on the owner
	// succeeds or its state is read.
	have := map[string][]netip.Addr{}
	doubt := map[string]bool{}
	settle := func() {
		for owner := range doubt {
			lease, ok := l.Get(owner)
			if ok {
				have[owner] = lease.Addrs
			} else {
				delete(have, owner)
			}
		}
		clear(doubt)
	}
	check := func() {
		t.Helper()
		seen := map[netip.Addr]string{}
		leases := l.Leases()
		for _, lease := range leases {
			if want := have[lease.Owner]; !slices.Equal(want, lease.Addrs) {
				t.Fatalf("owner %s has %v, was promised %v", lease.Owner, lease.Addrs, want)
			}
			for _, a := range lease.Addrs {
				if other, ok := seen[a]; ok {
					t.Fatalf("%s belongs to %s and %s", a, other, lease.Owner)
				}
				seen[a] = lease.Owner
			}
		}
		if len(leases) != len(have) {
			t.Fatalf("%d leases, promised %d", len(leases), len(have))
		}
	}
	for range 400 {
		owner := fmt.Sprintf("c%d/eth0", rng.IntN(18)) // more owners than addresses
		switch op := rng.IntN(20); {
		case op < 10:
			before := slices.Clone(l.freed)
			lease, err := l.Allocate(owner, nil)
			switch {
			case err == nil:
				if had, ok := have[owner]; ok && !slices.Equal(had, lease.Addrs) {
					t.Fatalf("owner %s was moved from %v to %v", owner, had, lease.Addrs)
				}
				oldestFirst(t, before, lease.Addrs[0], have[owner] != nil)
				have[owner] = lease.Addrs
			case errors.Is(err, ErrExhausted):
				if len(have) < 13 {
					t.Fatalf("exhausted with %d leases", len(have))
				}
			case errors.Is(err, errFault):
				doubt[owner] = true
			default:
				t.Fatal(err)
			}
		case op < 18:
			if err := l.Release(owner); err == nil {
				delete(have, owner)
			} else if errors.Is(err, errFault) {
				doubt[owner] = true
			} else {
				t.Fatal(err)
			}
		case op == 18: // the process dies between operations
			l.Close()
			l = reopen()
		default: // the process dies in the middle of an append
			l.Close()
			torn(t, dir, rng)
			l = reopen()
		}
		// A failed operation changed nothing in this process; the journal may
		// have it, which only the next start finds out.
		if len(doubt) > 0 && rng.IntN(2) == 0 {
			l.Close()
			l = reopen()
		}
		settle()
		check()
	}
	if broken.failures == 0 {
		t.Error("no fault was injected")
	}
}

// oldestFirst checks that a reused address is the one freed longest ago.
func oldestFirst(t *testing.T, freed []netip.Addr, got netip.Addr, again bool) {
	t.Helper()
	if again || !slices.Contains(freed, got) {
		return
	}
	for _, a := range freed {
		if a.Is4() {
			if a != got {
				t.Fatalf("reused %s before %s, which was freed earlier", got, a)
			}
			return
		}
	}
}

// torn adds the remains of an interrupted write.
func torn(t *testing.T, dir string, rng *rand.Rand) {
	t.Helper()
	f, err := os.OpenFile(journalPath(dir), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	line := `{"add":{"owner":"torn/eth0","addrs":["10.42.3.4","fd42::4"]}}`
	if _, err := f.WriteString(line[:rng.IntN(len(line))]); err != nil {
		t.Fatal(err)
	}
}

func TestJournalStaysShort(t *testing.T) {
	dir := t.TempDir()
	l := mustOpen(t, dir)
	for i := range 3 * compactAfter {
		owner := fmt.Sprint(i % 5)
		mustAllocate(t, l, owner)
		if err := l.Release(owner); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Stat(filepath.Join(dir, journalName))
	if err != nil {
		t.Fatal(err)
	}
	if st.Size() > 1<<20 {
		t.Errorf("journal has %d bytes", st.Size())
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte(`{"version":1,"boot":"boot-1"}` + "\n" + `{"add":{"owner":"a","addrs":["10.42.3.4"]}}` + "\n" + `{"del":"a"}` + "\n"))
	f.Add([]byte("{}\n{}\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(journalPath(dir), text, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(dir, "boot-1")
		if err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
		l.Close()
	})
}

func BenchmarkAllocateRelease(b *testing.B) {
	l, err := Open(b.TempDir(), "boot")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	l.SetRanges([]netip.Prefix{netip.MustParsePrefix("10.42.0.0/24"), rangeV6})
	for b.Loop() {
		if _, err := l.Allocate("a", nil); err != nil {
			b.Fatal(err)
		}
		if err := l.Release("a"); err != nil {
			b.Fatal(err)
		}
	}
}
