package integrity

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// Names of etcd's buckets, and of a key in the bucket meta.
const (
	keyBucket     = "key"
	metaBucket    = "meta"
	leaseBucket   = "lease"
	membersBucket = "members"

	consistentIndex = "consistent_index"
)

// contents is the summary of a database: the facts with which other files must agree.
type contents struct {
	path    string
	index   uint64   // of the last applied entry of the log
	members []string // IDs
	buckets map[string]int
	newest  uint64 // revision of the last key

	memberData [][]byte // values of members

	visit func(key, value []byte) // called with every write of a key, in order; may be nil
}

// check reports damage if etcd cannot have written this key with this value.
func (c *contents) check(bucket string, key, value []byte) *Damage {
	c.buckets[bucket]++
	what := ""
	switch bucket {
	case keyBucket:
		what = c.checkRevision(key, value)
	case metaBucket:
		what = c.checkMeta(string(key), value)
	case leaseBucket:
		if len(key) != 8 {
			what = fmt.Sprintf("has a lease with the invalid ID %x", key)
		} else if _, ok := fields(value, map[protowire.Number]protowire.Type{1: protowire.VarintType, 2: protowire.VarintType, 3: protowire.VarintType}); !ok {
			what = fmt.Sprintf("has a lease %x that cannot be decoded", key)
		}
	case membersBucket:
		if !json.Valid(value) {
			what = fmt.Sprintf("has a member %q that cannot be decoded", key)
		}
		c.members, c.memberData = append(c.members, string(key)), append(c.memberData, bytes.Clone(value))
	}
	if what != "" {
		return &Damage{File: c.path, What: what}
	}
	return nil
}

func (c *contents) checkMeta(name string, value []byte) string {
	switch name {
	case consistentIndex, "term":
		if len(value) != 8 {
			return fmt.Sprintf("has %s of %d bytes", name, len(value))
		}
		if name == consistentIndex {
			c.index = binary.BigEndian.Uint64(value)
		}
	case "scheduledCompactRev", "finishedCompactRev":
		if _, ok := revision(value); !ok {
			return fmt.Sprintf("has an invalid revision in %s", name)
		}
	}
	return ""
}

// keyValue holds the fields of mvccpb.KeyValue, the type of the values in the bucket key.
var keyValue = map[protowire.Number]protowire.Type{
	1: protowire.BytesType,  // the key
	2: protowire.VarintType, // create revision
	3: protowire.VarintType, // mod revision
	4: protowire.VarintType, // version
	5: protowire.BytesType,  // the value
	6: protowire.VarintType, // the lease
}

// checkRevision checks one revision of one key.
func (c *contents) checkRevision(key, value []byte) string {
	main, ok := revision(key)
	if !ok {
		return fmt.Sprintf("has a key %x that is not a revision", key)
	}
	c.newest = main
	if len(value) == 0 && binary.BigEndian.Uint64(key[9:]) == 0 && len(key) == revisionLength {
		return "" // of a restore, which begins with a revision without a key
	}
	got, ok := fields(value, keyValue)
	switch {
	case !ok || got[1] == 0:
		return fmt.Sprintf("has a revision %d that cannot be decoded", main)
	case len(key) == markedLength: // a deletion has no field but the key
		if len(got) != 1 {
			return fmt.Sprintf("has a deletion with a value at revision %d", main)
		}
	case got[3] != main || got[2] == 0 || got[2] > main || got[4] == 0 || got[4] > main:
		return fmt.Sprintf("has a revision %d whose value has revision %d", main, got[3])
	case c.visit != nil:
		c.visit(keyAndValue(value))
	}
	return ""
}

// keyAndValue returns the key and the value in a valid mvccpb.KeyValue.
func keyAndValue(message []byte) (key, value []byte) {
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		message = message[n:]
		switch {
		case kind == protowire.VarintType:
			_, n = protowire.ConsumeVarint(message)
		case number == 1:
			key, n = protowire.ConsumeBytes(message)
		default:
			value, n = protowire.ConsumeBytes(message)
		}
		message = message[n:]
	}
	return key, value
}

const (
	revisionLength = 8 + 1 + 8 // main, '_', sub
	markedLength   = revisionLength + 1
	tombstone      = 't'
)

// revision returns the main part of a key in the bucket key.
func revision(key []byte) (uint64, bool) {
	if len(key) != revisionLength && (len(key) != markedLength || key[revisionLength] != tombstone) || key[8] != '_' {
		return 0, false
	}
	main, sub := binary.BigEndian.Uint64(key), binary.BigEndian.Uint64(key[9:])
	return main, main>>63 == 0 && sub>>63 == 0
}

// fields decodes a protobuf message: the values of its varint fields and the lengths of its byte fields. It is strict,
// because only etcd has written the message: fields must be known, in order, and not repeated.
func fields(message []byte, known map[protowire.Number]protowire.Type) (map[protowire.Number]uint64, bool) {
	got := make(map[protowire.Number]uint64, len(known))
	last := protowire.Number(0)
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 || number <= last {
			return nil, false
		}
		if want, ok := known[number]; !ok || want != kind {
			return nil, false
		}
		message, last = message[n:], number
		if kind == protowire.VarintType {
			got[number], n = protowire.ConsumeVarint(message)
		} else {
			var b []byte
			b, n = protowire.ConsumeBytes(message)
			got[number] = uint64(len(b))
		}
		if n < 0 {
			return nil, false
		}
		message = message[n:]
	}
	return got, true
}

// readContents checks the structure of a database and the form of its keys and values.
func readContents(path string) (*contents, error) {
	c := &contents{path: path, buckets: map[string]int{}}
	return c, c.read()
}

func (c *contents) read() error {
	if err := checkDatabase(c.path, c.check); err != nil {
		return err
	}
	if c.index == 0 && c.buckets[keyBucket] > 0 {
		return damaged(c.path, "has keys, but no index of the last applied log entry")
	}
	return nil
}

// CheckDatabase checks the structure of a database file, which nobody changes meanwhile, and the form of its keys and values.
// It returns the revision of the last write in it. What follows the database in the file is not looked at. An error that is
// a *[Damage] says what is wrong with the file.
func CheckDatabase(path string) (revision int64, err error) {
	c, err := readContents(path)
	if err != nil {
		return 0, err
	}
	return int64(c.newest), nil
}
