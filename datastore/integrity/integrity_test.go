package integrity

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
)

const segment = 1 << 20

// newStore makes a directory like one of etcd: a log with entries, and a database that holds all of them.
func newStore(tb testing.TB, entries int, value []byte) string {
	tb.Helper()
	dir := tb.TempDir()
	for _, d := range []string{logDir, filepath.Dir(databaseFile)} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			tb.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, logDir)); err != nil { // wal.Create creates it
		tb.Fatal(err)
	}
	metadata, err := proto.Marshal(&pb.Metadata{NodeID: proto.Uint64(31), ClusterID: proto.Uint64(7)})
	if err != nil {
		tb.Fatal(err)
	}
	w, err := wal.Create(zap.NewNop(), filepath.Join(dir, logDir), metadata)
	if err != nil {
		tb.Fatal(err)
	}
	for i := range uint64(entries) {
		err := w.Save(&raftpb.HardState{Term: proto.Uint64(1), Commit: proto.Uint64(i)}, []*raftpb.Entry{{Index: proto.Uint64(i + 1), Term: proto.Uint64(1), Data: bytes.Repeat([]byte{'e'}, 2000)}})
		if err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	newDatabase(tb, filepath.Join(dir, databaseFile), entries, value)
	return dir
}

func newDatabase(tb testing.TB, path string, keys int, value []byte) {
	tb.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoFreelistSync: true, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		tb.Fatal(err)
	}
	put := func(bucket string, key, value []byte) {
		err := db.Update(func(tx *bbolt.Tx) error {
			b, err := tx.CreateBucketIfNotExists([]byte(bucket))
			if err == nil && key != nil {
				err = b.Put(key, value)
			}
			return err
		})
		if err != nil {
			tb.Fatal(err)
		}
	}
	put(metaBucket, []byte(consistentIndex), binary.BigEndian.AppendUint64(nil, uint64(keys)))
	put(membersBucket, []byte("1f"), []byte(`{"id":31}`))
	put("alarm", nil, nil)
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists([]byte(keyBucket))
		for i := range int64(keys) {
			if err != nil {
				return err
			}
			key := append(append(binary.BigEndian.AppendUint64(nil, uint64(i+2)), '_'), make([]byte, 8)...)
			kv := &mvccpb.KeyValue{Key: fmt.Appendf(nil, "/k/%d", i), CreateRevision: i + 2, ModRevision: i + 2, Version: 1, Value: value}
			if i%7 == 6 {
				key, kv = append(key, tombstone), &mvccpb.KeyValue{Key: kv.Key}
			}
			var data []byte
			if data, err = proto.Marshal(kv); err == nil {
				err = b.Put(key, data)
			}
		}
		return err
	})
	if err := errors.Join(err, db.Close()); err != nil {
		tb.Fatal(err)
	}
}

func TestSealAndCheck(t *testing.T) {
	dir := newStore(t, 500, bytes.Repeat([]byte("v"), 300))
	sum, err := Seal(dir)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := Check(dir, Known{Seal: sum, Segment: segment, Opened: true}); err != nil || !r.Sealed || r.SealInvalid {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := Check(dir, Known{Seal: sum, Segment: segment, Opened: true}); err != nil || r.Sealed || len(r.Members) != 1 {
		t.Errorf("the seal was not removed: %+v, %v", r, err)
	}
	if _, err := os.Stat(filepath.Join(dir, SealFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the seal still exists: %v", err)
	}
	if sum, err = Seal(dir); err != nil {
		t.Fatal(err)
	}
	if r, err := Check(dir, Known{Seal: "another", Segment: segment, Opened: true}); err != nil || r.Sealed || !r.SealInvalid {
		t.Errorf("the seal of another stop was accepted: %+v, %v", r, err)
	}
	if sum, err = Seal(dir); err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(dir, SealFile), 50)
	if r, err := Check(dir, Known{Seal: sum, Segment: segment, Opened: true}); err != nil || r.Sealed || !r.SealInvalid {
		t.Errorf("a damaged seal was accepted: %+v, %v", r, err)
	}
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[at] ^= 0x10
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestEveryByteOfAPage flips bits everywhere in the structure of the database. No key may disappear without an error.
func TestEveryByteOfAPage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	newDatabase(t, path, 700, []byte("v"))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := readContents(path)
	if err != nil {
		t.Fatal(err)
	}
	used := usedPages(t, path)
	r := rand.New(rand.NewPCG(1, 2))
	found := 0
	for range 1000 {
		page := used[r.IntN(len(used))]
		at := page*os.Getpagesize() + r.IntN(os.Getpagesize())
		b := bytes.Clone(whole)
		b[at] ^= 1 << r.IntN(8)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		again, err := readContents(path)
		var bad *Damage
		switch {
		case err == nil && again.buckets[keyBucket] != c.buckets[keyBucket]:
			t.Errorf("byte %d of page %d: %d keys of %d and no error", at%os.Getpagesize(), page, again.buckets[keyBucket], c.buckets[keyBucket])
		case err == nil:
		case !errors.As(err, &bad) || bad.File != path:
			t.Errorf("byte %d: %v", at, err)
		default:
			found++
		}
	}
	if found < 300 {
		t.Errorf("only %d of 1000 were found", found)
	}
	t.Logf("%d of 1000 found", found)
}

// usedPages returns the pages in use except the meta pages.
func usedPages(t *testing.T, path string) (all []int) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, _ := f.Stat()
	d := &database{path: path, file: f, size: st.Size(), content: func(string, []byte, []byte) *Damage { return nil }}
	if err := d.readMeta(); err != nil {
		t.Fatal(err)
	}
	d.used = make([]bool, d.meta.pages)
	if err := d.walk(d.meta.root, bounds{}, 0, d.rootElement); err != nil {
		t.Fatal(err)
	}
	for i, used := range d.used {
		if used {
			all = append(all, i)
		}
	}
	return all
}

// lastRecord returns the offset of the last record of a log.
func lastRecord(t *testing.T, b []byte) int {
	t.Helper()
	at, last := 0, 0
	for {
		length := binary.LittleEndian.Uint64(b[at:])
		if length == 0 {
			return last
		}
		last = at
		at += 8 + int(length&(1<<56-1)) + int(length>>56&7)
	}
}

// TestTornLog: the end of a log that a power cut has torn is overwritten with zeros. Damage that only looks like it is an
// error.
func TestTornLog(t *testing.T) {
	whole := newStore(t, 20, []byte("v"))
	name := filepath.Join(logDir, "0000000000000000-0000000000000000.wal")
	content, err := os.ReadFile(filepath.Join(whole, name))
	if err != nil {
		t.Fatal(err)
	}
	state := lastRecord(t, content)
	entry := lastRecord(t, append(bytes.Clone(content[:state]), make([]byte, 8)...))
	sectorAfter := (entry/sector + 1) * sector
	stateBefore := lastRecord(t, append(bytes.Clone(content[:entry]), make([]byte, 8)...))
	entryBefore := lastRecord(t, append(bytes.Clone(content[:stateBefore]), make([]byte, 8)...))
	sectorBefore := (entryBefore/sector + 1) * sector
	for _, tc := range []struct {
		name   string
		damage func(b []byte) []byte
		want   string // torn, or part of the error
	}{
		{"untouched", func(b []byte) []byte { return b }, ""},
		{"a sector is missing", func(b []byte) []byte { clear(b[sectorAfter : sectorAfter+sector]); return b }, "torn"},
		{"all from a sector on is missing", func(b []byte) []byte { clear(b[sectorAfter:]); return b }, "torn"},
		{"a bit of the entry", func(b []byte) []byte { b[entry+100] ^= 1; return b }, "crc mismatch"},
		{"a longer length", func(b []byte) []byte { b[entry+1] ^= 0x40; return b }, "is damaged at byte"},
		{"a length beyond the file", func(b []byte) []byte { b[entry+3] ^= 0x7f; return b }, "is damaged at byte"},
		{"no length", func(b []byte) []byte { clear(b[entry : entry+8]); return b }, "is damaged at byte"},
		{"no length of an early entry", func(b []byte) []byte { clear(b[4096:4608]); return b }, "is damaged at byte"},
		{"a sector of the last entry but one", func(b []byte) []byte { clear(b[sectorBefore : sectorBefore+sector]); return b }, "is damaged at byte"},
		{"the file ends in the entry", func(b []byte) []byte { return b[:entry+700] }, "is damaged at byte"},
		{"the file ends before the entry", func(b []byte) []byte { return b[:entry] }, "ends at byte"},
		{"empty", func([]byte) []byte { return nil }, "is empty"},
		{"a bit of the first record", func(b []byte) []byte { b[0] ^= 1; return b }, "damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, name)
			if err := os.WriteFile(path, tc.damage(bytes.Clone(content)), 0o600); err != nil {
				t.Fatal(err)
			}
			if tc.want == "torn" { // the database does not hold the torn entry
				if err := os.Remove(filepath.Join(dir, databaseFile)); err != nil {
					t.Fatal(err)
				}
				newDatabase(t, filepath.Join(dir, databaseFile), 19, []byte("v"))
			}
			before, _ := os.ReadFile(path)
			r, err := Check(dir, Known{Segment: segment, Opened: true})
			if after, _ := os.ReadFile(path); err != nil && !bytes.Equal(before, after) {
				t.Error("Check changed a file in which it found damage")
			}
			var bad *Damage
			switch {
			case tc.want == "" || tc.want == "torn":
				if err != nil || (r.Torn != "") != (tc.want == "torn") {
					t.Fatalf("%+v, %v", r, err)
				}
				if r, err := Check(dir, Known{Segment: segment, Opened: true}); err != nil || r.Torn != "" {
					t.Errorf("second check: %+v, %v", r, err)
				}
				if st, err := os.Stat(path); err != nil || st.Size() != segment {
					t.Errorf("the size of the file has changed: %v, %v", st.Size(), err)
				}
			case !errors.As(err, &bad) || !strings.Contains(err.Error(), tc.want) && !strings.Contains(err.Error(), "committed"):
				t.Errorf("%v, want one with %q", err, tc.want)
			}
		})
	}
}

// TestLogIsCutShort: the last file of the log is as long as it was allocated, unless etcd was interrupted while it opened the
// file; and the newest file that was seen is there.
func TestLogIsCutShort(t *testing.T) {
	dir := newStore(t, 20, []byte("v"))
	path := filepath.Join(dir, logDir, "0000000000000000-0000000000000000.wal")
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, int64(len(bytes.TrimRight(content, "\x00"))+7)&^7); err != nil {
		t.Fatal(err)
	}
	var bad *Damage
	if _, err := Check(dir, Known{Segment: segment, Opened: true}); !errors.As(err, &bad) || bad.File != path {
		t.Errorf("a file that was cut off behind a record: %v", err)
	}
	const next = "0000000000000001-0000000000000015.wal"
	if _, err := Check(dir, Known{Segment: segment, Newest: next}); !errors.As(err, &bad) || filepath.Base(bad.File) != next {
		t.Errorf("without its newest file: %v", err)
	}
	if _, err := Check(dir, Known{Segment: segment, Newest: filepath.Base(path)}); err != nil {
		t.Errorf("as after an interrupted start: %v", err)
	}
}

// TestTypeOfARecord: the type of a record is not covered by its checksum, and every change of it is found, wherever it is.
func TestTypeOfARecord(t *testing.T) {
	dir := newStore(t, 3, []byte("v"))
	if err := os.Remove(filepath.Join(dir, databaseFile)); err != nil {
		t.Fatal(err)
	}
	newDatabase(t, filepath.Join(dir, databaseFile), 1, []byte("v")) // it lags, as after a crash
	path := filepath.Join(dir, logDir, "0000000000000000-0000000000000000.wal")
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	records := 0
	for at := int64(0); ; records++ {
		record, size := frame(content[at:])
		if record == 0 {
			break
		}
		for bit := range 4 {
			changed := bytes.Clone(content)
			changed[at+frameLength+1] ^= 1 << bit
			if err := os.WriteFile(path, changed, 0o600); err != nil {
				t.Fatal(err)
			}
			var bad *Damage
			if _, err := Check(dir, Known{Segment: segment, Opened: true}); !errors.As(err, &bad) {
				t.Errorf("record %d, bit %d of the type: %v", records, bit, err)
			}
		}
		at += size
	}
	if records < 8 {
		t.Errorf("the log has %d records", records)
	}
}

// FuzzDatabase: no content of the file makes the check panic.
func FuzzDatabase(f *testing.F) {
	path := filepath.Join(f.TempDir(), "db")
	newDatabase(f, path, 120, []byte("v"))
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	whole = bytes.TrimRight(whole, "\x00")
	f.Add(0, []byte{0})
	f.Add(16384+10, []byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, at int, with []byte) {
		b := bytes.Clone(whole)
		if at < 0 || at >= len(b) {
			return
		}
		copy(b[at:], with)
		c := &contents{path: path, buckets: map[string]int{}}
		d := &database{path: path, file: bytes.NewReader(append(b, make([]byte, 1<<16)...)), size: int64(len(b)) + 1<<16, content: c.check}
		if d.readMeta() != nil || d.meta.pages > 1<<20 {
			return
		}
		d.used = make([]bool, d.meta.pages)
		_ = errors.Join(d.walk(d.meta.root, bounds{}, 0, d.rootElement), d.checkFreelist())
	})
}

// BenchmarkCheck measures the figures in datastore/DESIGN.md: 100 MB in 50,000 keys.
func BenchmarkCheck(b *testing.B) {
	dir := newStore(b, 50_000, bytes.Repeat([]byte("v"), 2000))
	b.Run("seal", func(b *testing.B) {
		for b.Loop() {
			if _, err := Seal(dir); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("sealed", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			sum, err := Seal(dir)
			if err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if _, err := Check(dir, Known{Seal: sum, Segment: segment, Opened: true}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unsealed", func(b *testing.B) {
		for b.Loop() {
			if _, err := Check(dir, Known{Segment: segment, Opened: true}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// A record that a full disk has cut off at the end of the segment was never acknowledged. A record with a damaged length,
// by which it seems to extend beyond the segment, was.
func TestLogCutOffByAFullDisk(t *testing.T) {
	const segment = 1 << 16
	kind, crc := int64(wal.EntryType), uint32(7)
	body, err := proto.Marshal(&walpb.Record{Type: &kind, Crc: &crc, Data: bytes.Repeat([]byte("x"), 3001)})
	if err != nil {
		t.Fatal(err)
	}
	frame := func(length int) []byte {
		pad := (8 - length%8) % 8
		b := binary.LittleEndian.AppendUint64(nil, uint64(length)|uint64(0x80|pad)<<56)
		return append(b, body...)
	}
	for _, tc := range []struct {
		name string
		tail []byte
		size int64 // of the file
		want bool
	}{
		{"cut off at the end of the segment", frame(len(body))[:1000], segment, true},
		{"cut off in its first bytes", frame(len(body))[:10], segment, false},
		{"cut off before the end of the segment", frame(len(body))[:1000], segment - 8, false},
		{"cut off beyond the segment", frame(len(body))[:1000], segment + 512, true},
		{"with a longer length", frame(len(body) | 1<<14)[:len(body)], segment, false},
	} {
		if got := isTorn(tc.tail, tc.size-int64(len(tc.tail)), segment); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}
