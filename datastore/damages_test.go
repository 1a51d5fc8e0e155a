package datastore

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/datastore/integrity"
	"kedge/datastore/peers"
)

// The list of damages: every file of a store, damaged in every way, after an orderly stop and after a kill, as the only member, or
// as one of several while the others take writes. What each damage must lead to is in expectation.

// verdict is what became of a damaged member.
type verdict string

const (
	// refused: the member does not start, names the damaged file and the commands that help, and has changed nothing.
	refused verdict = "refused"
	// unlike: the member does not start, since its data is not that of the others.
	unlike verdict = "unlike"
	// whole: the member starts, nothing is lost, and all members hold the same.
	whole verdict = "whole"
	// altered: as whole, but for the name or value of an object of a lone member, of which nothing tells what was written.
	altered verdict = "altered"
)

// damageTarget is a part of a store that is damaged.
type damageTarget struct {
	name string
	// find returns the damaged file, and the part of it that is in use. ok is false if the store has no such file.
	find func(dir string, random *rand.Rand) (file string, from, to int, ok bool)
}

var damageTargets = []damageTarget{
	{"database", func(dir string, _ *rand.Rand) (string, int, int, bool) {
		return usedPart(filepath.Join(dir, memberDir, "snap", "db"), 0)
	}},
	{"end of the log", func(dir string, _ *rand.Rand) (string, int, int, bool) {
		return usedPart(lastFile(dir, "wal", ".wal"), 0.97)
	}},
	{"middle of the log", func(dir string, random *rand.Rand) (string, int, int, bool) {
		files, _ := filepath.Glob(filepath.Join(dir, memberDir, "wal", "*.wal"))
		if len(files) == 0 {
			return "", 0, 0, false
		}
		file, from, to, ok := usedPart(files[random.IntN(len(files))], 0)
		return file, from, to - (to-from)/10, ok
	}},
	{"raft snapshot", func(dir string, _ *rand.Rand) (string, int, int, bool) {
		return usedPart(lastFile(dir, "snap", ".snap"), 0)
	}},
	{"seal", func(dir string, _ *rand.Rand) (string, int, int, bool) {
		return usedPart(filepath.Join(dir, integrity.SealFile), 0)
	}},
	{"address book", func(dir string, _ *rand.Rand) (string, int, int, bool) {
		return usedPart(filepath.Join(dir, peers.BookFile), 0)
	}},
}

// lastFile returns the last of the files with a suffix in a folder of the member.
func lastFile(dir, folder, suffix string) string {
	files, _ := filepath.Glob(filepath.Join(dir, memberDir, folder, "*"+suffix))
	if len(files) == 0 {
		return filepath.Join(dir, "none")
	}
	return slices.Max(files)
}

// usedPart returns the part of a file before the zeros at its end, from a share of it on.
func usedPart(file string, share float64) (_ string, from, to int, ok bool) {
	content, err := os.ReadFile(file)
	if err != nil {
		return file, 0, 0, false
	}
	to = len(bytes.TrimRight(content, "\x00"))
	return file, int(share * float64(to)), to, to > 0
}

// damageKinds are the ways in which a file is damaged between from and to; nil means that the file is gone.
var damageKinds = map[string]func(random *rand.Rand, content []byte, from, to int) []byte{
	"a bit": func(random *rand.Rand, content []byte, from, to int) []byte {
		content[from+random.IntN(to-from)] ^= 1 << random.IntN(8)
		return content
	},
	"some bytes": func(random *rand.Rand, content []byte, from, to int) []byte {
		for range 2 + random.IntN(63) {
			content[from+random.IntN(to-from)] ^= byte(1 + random.IntN(255))
		}
		return content
	},
	"a row of bytes": func(random *rand.Rand, content []byte, from, to int) []byte {
		at := from + random.IntN(to-from)
		for i := at; i < min(at+2+random.IntN(63), to); i++ {
			content[i] ^= byte(1 + random.IntN(255))
		}
		return content
	},
	"a lost sector": func(random *rand.Rand, content []byte, from, to int) []byte {
		// Not at the very end: a sector of the log's last flush that is lost cannot be told from one that was never flushed.
		const sector, lastFlush = 512, 16 << 10
		if to-from > lastFlush || to < len(content) { // the used part of a file that was allocated
			from, to = min(from, to-lastFlush-sector), to-lastFlush
		}
		at := max(0, from+random.IntN(to-from)) / sector * sector
		clear(content[at:min(at+sector, len(content))])
		return content
	},
	"truncated": func(random *rand.Rand, content []byte, from, to int) []byte {
		return content[:from+random.IntN(to-from)]
	},
	"empty":   func(*rand.Rand, []byte, int, int) []byte { return []byte{} },
	"missing": func(*rand.Rand, []byte, int, int) []byte { return nil },
}

// expectation returns what a damage may lead to, with so many members.
func expectation(target, kind string, sealed bool, members int) []verdict {
	switch target {
	case "raft snapshot", "seal", "address book":
		return []verdict{whole} // etcd never reads the first, and the store holds what the others say
	case "database", "middle of the log", "end of the log":
	default:
		panic(target)
	}
	if sealed || kind == "missing" || kind == "empty" {
		return []verdict{refused}
	}
	switch {
	case target == "database" && members == 1:
		// A page that is not in use may be damaged without effect.
		return []verdict{refused, whole, altered}
	case target == "database":
		return []verdict{refused, whole, unlike}
	default:
		return []verdict{refused}
	}
}

// damaged is a cluster of which one member is damaged again and again.
type damaged struct {
	*testing.T
	random  *rand.Rand
	all     []*machine
	victim  *machine
	ledger  *ledger
	resume  func() // starts the clients, if the victim is the only member
	pause   func() // ends the clients
	results map[string]map[verdict]int
}

// fixedKeys are written once, so that most of the database does not change.
const fixedKeys = 300

// newDamaged makes such a cluster.
func newDamaged(t *testing.T, members int) *damaged {
	t.Helper()
	var addresses []string
	for i := range members {
		addresses = append(addresses, fmt.Sprintf("10.0.0.%d/24", i+1))
	}
	d := &damaged{T: t, random: seedFor(t), ledger: newLedger(), results: map[string]map[verdict]int{}}
	d.all = machinesWith(t, func(c *Config) {
		// So that there are snapshots of raft, and members that lag catch up in both ways.
		c.Alone.SnapshotCount, c.Alone.SnapshotCatchUp = 400, 200
		c.Several.SnapshotCount, c.Several.SnapshotCatchUp = 400, 200
	}, addresses...)
	for i := range fixedKeys {
		if err := d.ledger.write(d.all[0], fmt.Sprintf("/l/fixed-%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	d.victim = d.all[d.random.IntN(len(d.all))]
	d.resume = func() {
		d.pause = d.ledger.keepWriting(3, func(client int) asker { return d.others()[client%len(d.others())] })
	}
	d.resume()
	t.Cleanup(func() { d.pause() })
	return d
}

// others are the members that take writes meanwhile: all but the victim, if there are any.
func (d *damaged) others() (out []*machine) {
	for _, m := range d.all {
		if m != d.victim || len(d.all) == 1 {
			out = append(out, m)
		}
	}
	return out
}

// awaitWrites waits until clients have written some more.
func (d *damaged) awaitWrites(n int) {
	d.Helper()
	d.ledger.await(d.T, n)
}

// group ends the victim, in order or by a kill, and damages one part of its files in the given ways. Between them the files are
// what they were at the end.
func (d *damaged) group(target damageTarget, sealed bool, kinds []string) {
	d.Helper()
	for len(kinds) > 0 {
		d.awaitWrites(10 + d.random.IntN(60))
		if sealed {
			d.victim.stop()
		} else {
			d.victim.kill()
		}
		if len(d.all) == 1 {
			d.pause()
		}
		d.victim.cfg.Join = nil
		kept := filepath.Join(d.TempDir(), "kept")
		mirror(d.T, d.victim.cfg.Dir, kept)
		for len(kinds) > 0 {
			kind := kinds[0]
			kinds = kinds[1:]
			file, from, to, ok := target.find(d.victim.cfg.Dir, d.random)
			if !ok {
				continue
			}
			is := d.damage(target.name, kind, sealed, file, from, to)
			if is == whole || is == altered {
				break // it has taken part: its files of before must not come back
			}
			if err := os.RemoveAll(d.victim.cfg.Dir); err != nil {
				d.Fatal(err)
			}
			mirror(d.T, kept, d.victim.cfg.Dir)
		}
		if d.victim.command == nil {
			d.victim.start()
			d.victim.await("check", "ok")
		}
		d.verify("the undamaged files")
		if len(d.all) == 1 {
			d.resume()
		}
	}
}

// damage damages a file, starts the victim, and judges what becomes of it.
func (d *damaged) damage(target, kind string, sealed bool, file string, from, to int) verdict {
	d.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		d.Fatal(err)
	}
	before, had := bytes.Clone(content), d.lastEntry()
	if content = damageKinds[kind](d.random, content, from, to); content == nil {
		err = os.Remove(file)
	} else {
		err = errors.Join(os.WriteFile(file, content, 0o600), os.Truncate(file, int64(len(content))))
	}
	if err != nil {
		d.Fatal(err)
	}
	about := fmt.Sprintf("%s: %s, sealed %v, %d members", target, kind, sealed, len(d.all))
	if content != nil && bytes.Equal(content, before) {
		return "" // the sector was empty
	}
	has := d.lastEntry()
	d.victim.start()
	is := d.judge(about, file)
	want := expectation(target, kind, sealed, len(d.all))
	if has >= had && strings.HasSuffix(target, "of the log") {
		want = append(want, whole) // the padding of a record
	}
	if !slices.Contains(want, is) {
		d.Errorf("%s: the member is %s, want %v", about, is, want)
		d.keep(file, before, content)
	}
	row := fmt.Sprintf("%d | %v | %s | %s", len(d.all), sealed, target, kind)
	if d.results[row] == nil {
		d.results[row] = map[verdict]int{}
	}
	d.results[row][is]++
	return is
}

// lastEntry returns the index of the last entry in the victim's log, 0 if the log is not good.
func (d *damaged) lastEntry() uint64 {
	state, err := integrity.ReadState(d.victim.cfg.Dir, integrity.Known{Segment: walSegment, Opened: true}, nil)
	if err != nil {
		return 0
	}
	return state.LastIndex
}

// keep keeps a file as it was and as it was damaged, for a person who looks into a failure.
func (d *damaged) keep(file string, before, after []byte) {
	base := filepath.Join(d.ArtifactDir(), fmt.Sprint(time.Now().UnixNano()))
	err := errors.Join(os.WriteFile(base+"-before", before, 0o600), os.WriteFile(base+"-after", after, 0o600))
	d.Logf("%s is %s-before and -after, %v", file, base, err)
}

// judge returns what became of the victim, whose file is damaged.
func (d *damaged) judge(about, file string) verdict {
	d.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		answer, err := d.victim.ask("check")
		if err == nil && answer == "ok" {
			break
		}
		if errors.Is(err, errEnded) {
			return d.judgeRefusal(about, file)
		}
		if time.Now().After(deadline) {
			d.Fatalf("%s: the member neither ends nor is ready: %q, %v", about, answer, err)
		}
	}
	if len(d.all) == 1 {
		for _, problem := range d.ledger.verify(d.victim) {
			if !strings.Contains(problem, "is not what was written") {
				d.Errorf("%s: %s", about, problem)
				continue
			}
			d.Logf("%s: %s", about, problem)
			d.repair()
			return altered
		}
		return whole
	}
	d.verify(about)
	return whole
}

// repair writes all keys anew, one of which is not what was written.
func (d *damaged) repair() {
	d.Helper()
	for key := range maps.Clone(d.ledger.keys) {
		_ = d.ledger.write(d.victim, key)
	}
	d.ledger.problems = nil
	d.verify("after a repair")
}

// judgeRefusal checks how a member has ended that was damaged: with a message that helps.
func (d *damaged) judgeRefusal(about, file string) verdict {
	d.Helper()
	d.victim.readers.Wait()
	_ = d.victim.command.Wait()
	code := d.victim.command.ProcessState.ExitCode()
	d.victim.command = nil
	_, said, found := strings.Cut(d.victim.said.String(), "Run: ")
	said = strings.TrimSpace(said)
	if !found || code != childFailed || strings.Contains(said, "\n") || !strings.Contains(said, `"kedge server reset"`) {
		d.Errorf("%s: it has ended with exit code %d and says %q", about, code, d.victim.said.String())
		return "lost"
	}
	switch {
	case strings.Contains(said, ErrCorrupt.Error()):
		return unlike
	case !strings.Contains(said, ErrDamaged.Error()), !strings.Contains(said, `"kedge snapshot restore"`), !strings.Contains(said, filepath.Dir(file)):
		d.Errorf("%s: the message does not help: %q", about, said)
	}
	return refused
}

// verify checks that no member lacks a write that was acknowledged, and that all hold the same.
func (d *damaged) verify(about string) {
	d.Helper()
	for _, problem := range d.ledger.verify(d.victim) {
		d.Errorf("%s: %s", about, problem)
	}
	agree(d.T, about, d.all)
}

// followTheMessage does what the message of a refused member of several says: it is set aside and joins anew.
func (d *damaged) followTheMessage() {
	d.Helper()
	d.awaitWrites(10)
	d.victim.kill()
	if err := os.Remove(filepath.Join(d.victim.cfg.Dir, memberDir, "snap", "db")); err != nil {
		d.Fatal(err)
	}
	d.victim.start()
	if is := d.judge("no database", filepath.Join(d.victim.cfg.Dir, memberDir, "snap", "db")); is != refused {
		d.Fatalf("without its database the member is %s", is)
	}
	if kept, err := SetAside(d.victim.cfg.Dir, time.Now()); err != nil || kept == "" {
		d.Fatalf("set aside: %q, %v", kept, err)
	}
	d.victim.admit(d.others()[0])
	d.victim.start()
	d.victim.await("check", "ok")
	d.verify("after a new join")
}

// print prints the results as a table.
func (d *damaged) print(w io.Writer) {
	fmt.Fprintln(w, "| members | stopped in order | damaged | how | what became of it |\n|---|---|---|---|---|")
	for _, row := range slices.Sorted(maps.Keys(d.results)) {
		var became []string
		for _, is := range slices.Sorted(maps.Keys(d.results[row])) {
			became = append(became, fmt.Sprintf("%d %s", d.results[row][is], is))
		}
		fmt.Fprintf(w, "| %s | %s |\n", row, strings.Join(became, ", "))
	}
}

// TestDamages: no damage of any file is silent, and none loses what was acknowledged; see expectation.
func TestDamages(t *testing.T) {
	requireLong(t)
	t.Parallel()
	for _, members := range []int{1, 3, 5} {
		t.Run(fmt.Sprintf("%d members", members), func(t *testing.T) {
			t.Parallel()
			rounds := 1
			if n, ok := number(t, tortureVar); ok {
				rounds = 1 + int(n)/500
			}
			d := newDamaged(t, members)
			for range rounds {
				for _, target := range damageTargets {
					for _, sealed := range []bool{true, false} {
						kinds := slices.Sorted(maps.Keys(damageKinds))
						d.random.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
						d.group(target, sealed, kinds[:min(len(kinds), d.share(target, sealed))])
					}
				}
			}
			if members > 1 {
				d.followTheMessage()
			}
			d.print(t.Output())
		})
	}
}

// share is the number of kinds of damage that are tried: all of them by "make torture". A start takes a second with several members.
func (d *damaged) share(target damageTarget, sealed bool) int {
	starts := slices.Contains(expectation(target.name, "a bit", sealed, len(d.all)), whole)
	switch {
	case tortured():
		return len(damageKinds)
	case !starts:
		return 4
	case len(d.all) == 5:
		return 0
	default:
		return 1
	}
}
