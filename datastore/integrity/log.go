package integrity

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// logFile is one file of the write-ahead log.
type logFile struct {
	path       string
	seq, index uint64
}

// logFiles returns the files of the log in order. A gap in their sequence is damage.
func logFiles(dir string) ([]logFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []logFile
	for _, e := range entries { // sorted by name, which is their order
		f := logFile{path: filepath.Join(dir, e.Name())}
		if !strings.HasSuffix(e.Name(), ".wal") {
			continue
		}
		if _, err := fmt.Sscanf(e.Name(), "%016x-%016x.wal", &f.seq, &f.index); err != nil {
			continue // etcd ignores such a file too
		}
		if n := len(all); n > 0 && f.seq != all[n-1].seq+1 {
			return nil, damaged(filepath.Join(dir, fmt.Sprintf("%016x-*.wal", all[n-1].seq+1)), "is missing")
		}
		all = append(all, f)
	}
	return all, nil
}

// log is the summary of a log: the facts with which other files must agree.
type log struct {
	identity Identity
	last     uint64 // index of the last entry, or of a snapshot after it
	lastTerm uint64 // of that entry or snapshot
	commit   uint64 // commit index in the last hard state
	term     uint64 // in the last hard state

	known bool // whether the log has an entry or snapshot

	torn   string // file that ends in a write that was never acknowledged; empty if none does
	tornAt int64
}

// clear overwrites a torn end of the log, which was never acknowledged, with zeros.
func (l *log) clear() error {
	if l.torn == "" {
		return nil
	}
	f, err := os.OpenFile(l.torn, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(make([]byte, st.Size()-l.tornAt), l.tornAt); err != nil {
		return err
	}
	return f.Sync()
}

// Identity names the cluster and the member to which a log belongs.
type Identity struct{ Cluster, Member uint64 }

// NewestLogFile returns the name of the newest file of the log of the store in dir, or nothing if there is none.
func NewestLogFile(dir string) (string, error) {
	files, err := logFiles(filepath.Join(dir, logDir))
	if err != nil || len(files) == 0 {
		return "", err
	}
	return filepath.Base(files[len(files)-1].path), nil
}

// ReadIdentity returns the identity in the log of the store in dir.
func ReadIdentity(dir string) (id Identity, err error) {
	files, err := logFiles(filepath.Join(dir, logDir))
	if err != nil || len(files) == 0 {
		return id, err
	}
	f, err := os.Open(files[len(files)-1].path)
	if err != nil {
		return id, err
	}
	defer f.Close()
	d := wal.NewDecoder(fileutil.NewFileReader(f))
	var record walpb.Record
	for range 2 { // the checksum of the previous file, then the metadata
		if err := d.Decode(&record); err != nil {
			return id, damaged(f.Name(), "cannot be read: %v", err)
		}
		if record.GetType() == wal.CrcType {
			d.UpdateCRC(record.GetCrc())
		}
	}
	var l log
	if record.GetType() != wal.MetadataType || !l.setIdentity(record.Data) {
		return id, damaged(f.Name(), "has no cluster and member ID")
	}
	return l.identity, nil
}

func (l *log) setIdentity(data []byte) bool {
	var m pb.Metadata
	if proto.Unmarshal(data, &m) != nil {
		return false
	}
	id := Identity{Cluster: m.GetClusterID(), Member: m.GetNodeID()}
	ok := l.identity == Identity{} || l.identity == id
	l.identity = id
	return ok
}

// readLog reads the whole log like etcd, whose records have chained checksums. An end that a power cut has torn was never
// acknowledged, and is recorded in torn.
//
// etcd truncates the log at the first record that it cannot decode. So a damaged length makes etcd drop all records after
// it, acknowledged or not. Here the end counts as torn only if a whole sector is missing, as it is if the disk has not
// written it.
func readLog(dir string, known Known) (*log, error) {
	files, err := logFiles(dir)
	if err != nil {
		return nil, err
	}
	if n := len(files); n > 0 && filepath.Base(files[n-1].path) < known.Newest {
		return nil, damaged(filepath.Join(dir, known.Newest), "is missing")
	}
	l := &log{}
	crc := uint32(0)
	for i, f := range files {
		if crc, err = l.readFile(f.path, crc, i == 0, i == len(files)-1, known); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// readFile reads one file of the log. crc is the checksum of all files before it.
func (l *log) readFile(path string, crc uint32, first, last bool, known Known) (uint32, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if st.Size() == 0 {
		return 0, damaged(path, "is empty")
	}
	d := wal.NewDecoder(fileutil.NewFileReader(f))
	var record walpb.Record
	records := 0
	for err = d.Decode(&record); err == nil; err = d.Decode(&record) {
		if record.GetType() == wal.CrcType {
			if records == 0 && !first && record.GetCrc() != crc {
				return 0, damaged(path, "does not continue the file before it")
			}
			if records > 0 && record.GetCrc() != d.LastCRC() {
				return 0, damaged(path, "has a wrong checksum at byte %d", d.LastOffset())
			}
			d.UpdateCRC(record.GetCrc())
		}
		if records == 0 && record.GetType() != wal.CrcType || records == 1 && record.GetType() != wal.MetadataType {
			return 0, damaged(path, "does not begin with the header of a log file")
		}
		if what := l.check(&record); what != "" {
			return 0, damaged(path, "%s at byte %d", what, d.LastOffset())
		}
		records++
	}
	at := d.LastOffset()
	switch {
	case errors.Is(err, io.EOF) && records < 2, errors.Is(err, io.ErrUnexpectedEOF) && records < 2:
		return 0, damaged(path, "does not begin with the header of a log file")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
	default:
		return 0, damaged(path, "is damaged at byte %d: %v", at, err)
	}
	tail := make([]byte, st.Size()-at)
	if _, err := f.ReadAt(tail, at); err != nil {
		return 0, err
	}
	if len(tail) == 0 || allZero(tail) {
		if last && known.Opened && st.Size() < known.Segment {
			return 0, damaged(path, "ends at byte %d, and was allocated with %d bytes: entries at its end may be missing", st.Size(), known.Segment)
		}
		return d.LastCRC(), nil
	}
	if !last || !isTorn(tail, at, known.Segment) {
		return 0, damaged(path, "is damaged at byte %d: the entries after it cannot be read", at)
	}
	l.torn, l.tornAt = path, at
	return d.LastCRC(), nil
}

// check adds a record to the summary of the log, and returns its damage, if any. The checksum of a record does not cover its type,
// so the record must be one that etcd writes with this type.
func (l *log) check(record *walpb.Record) (what string) {
	switch record.GetType() {
	case wal.CrcType:
	case wal.MetadataType:
		if !l.setIdentity(record.Data) {
			return "belongs to another member"
		}
	case wal.EntryType:
		var e raftpb.Entry
		if proto.Unmarshal(record.Data, &e) != nil || hasUnknown(&e) || e.GetType() != raftpb.EntryNormal && len(e.GetData()) == 0 {
			return "has an entry that cannot be decoded"
		}
		if l.known && e.GetIndex() > l.last+1 {
			return fmt.Sprintf("has entry %d after entry %d", e.GetIndex(), l.last)
		}
		l.last, l.lastTerm, l.known = e.GetIndex(), e.GetTerm(), true
	case wal.StateType:
		var s raftpb.HardState
		if proto.Unmarshal(record.Data, &s) != nil || hasUnknown(&s) {
			return "has a hard state that cannot be decoded"
		}
		l.commit, l.term = s.GetCommit(), s.GetTerm()
	case wal.SnapshotType:
		var s walpb.Snapshot
		if proto.Unmarshal(record.Data, &s) != nil || hasUnknown(&s) {
			return "has a snapshot that cannot be decoded"
		}
		if s.GetIndex() > l.last {
			l.last, l.lastTerm, l.known = s.GetIndex(), s.GetTerm(), true
		}
	default:
		return fmt.Sprintf("has a record of the unknown type %d", record.GetType())
	}
	return ""
}

// hasUnknown reports whether a message has fields that its type does not have.
func hasUnknown(m proto.Message) bool { return len(m.ProtoReflect().GetUnknown()) > 0 }

const (
	sector      = 512
	frameLength = 8
	// maxHeader is the greatest length of what a record has before its data: type, checksum, and the length of the data.
	maxHeader = 2 + 6 + 6
)

// frame decodes the beginning of a record: its own length, and the length with the frame and the padding.
func frame(b []byte) (record, size int64) {
	for i := range 7 {
		record |= int64(b[i]) << (8 * i)
	}
	size = frameLength + record
	if b[7]&0x80 != 0 {
		size += int64(b[7] & 7)
	}
	return record, size
}

// isTorn reports whether the end of the log, tail, which begins at offset at, is what a power cut or a full disk leaves of
// unacknowledged writes: some sectors were written, and others were not. A file that ends within a record is torn only if
// it has grown beyond the size of a segment, which is allocated in advance, or could not grow beyond it.
func isTorn(tail []byte, at, segment int64) bool {
	if len(tail) < frameLength || flushedSince(tail) {
		return false
	}
	// piece returns the end of the sector that has byte i of the tail, and whether the disk has not written it.
	piece := func(i int64) (end int64, missing bool) {
		begin := max(0, i-(at+i)%sector)
		end = min(i+sector-(at+i)%sector, int64(len(tail)))
		return end, allZero(tail[begin:end])
	}
	record, end := frame(tail)
	if _, missing := piece(0); missing {
		return true // the length is in a sector that is missing
	}
	if headerEnd := int64(frameLength + maxHeader - 1); headerEnd < int64(len(tail)) {
		_, first := piece(frameLength)
		_, last := piece(headerEnd)
		if !first && !last && !recordIs(tail[frameLength:], record) {
			return false // the length is damaged
		}
	}
	if end > int64(len(tail)) {
		// A full disk cuts a record off at the end of the segment, since only the segment is allocated.
		size := at + int64(len(tail))
		return size > segment || size == segment && recordIs(tail[frameLength:], record)
	}
	for from := int64(0); from < end; {
		to, missing := piece(from)
		if missing {
			return true
		}
		from = to
	}
	return false
}

// flushedSince reports whether the log was flushed after the record with which tail begins was written: then the record was
// whole, and may have been acknowledged, whatever it lacks now.
//
// etcd flushes the log whenever it has written entries, and the hard state behind them. So what is not flushed is any number of
// hard states, entries, and one more hard state. A record after that was written after a flush. Records are found by their form,
// since the checksum of each depends on all before it.
func flushedSince(tail []byte) bool {
	entries, state := false, false
	for len(tail) >= frameLength {
		record, size := frame(tail)
		kind, ok := int64(0), false
		if record > 0 && size <= int64(len(tail)) {
			kind, ok = recordType(tail[frameLength:], record)
		}
		if !ok {
			tail = tail[frameLength:] // to which records are aligned
			continue
		}
		switch {
		case entries && state:
			return true
		case kind == wal.EntryType:
			entries = true
		case kind == wal.StateType:
			state = entries
		}
		tail = tail[size:]
	}
	return false
}

// recordIs reports whether a record (walpb.Record) that begins with begin has the given length by its own fields. A damaged
// length of its frame does not match.
func recordIs(begin []byte, length int64) bool {
	_, ok := recordType(begin, length)
	return ok
}

// recordType returns the type of a record that begins with begin. ok is false if it does not have the given length by its own
// fields.
func recordType(begin []byte, length int64) (kind int64, ok bool) {
	const typeField, dataField = 1, 3
	for rest := begin; ; {
		number, wire, n := protowire.ConsumeTag(rest)
		if n < 0 {
			return 0, false
		}
		rest = rest[n:]
		switch {
		case number == typeField && wire == protowire.VarintType:
			value, n := protowire.ConsumeVarint(rest)
			if n < 0 {
				return 0, false
			}
			kind, rest = int64(value), rest[n:]
			continue
		case number == dataField && wire == protowire.BytesType:
			size, n := protowire.ConsumeVarint(rest)
			return kind, n > 0 && int64(len(begin)-len(rest)+n)+int64(size) == length
		}
		if n = protowire.ConsumeFieldValue(number, wire, rest); n < 0 {
			return 0, false
		}
		rest = rest[n:]
	}
}

func allZero(b []byte) bool {
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
