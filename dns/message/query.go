package message

import (
	"encoding/binary"
	"errors"
)

const (
	headerLen   = 12
	maxName     = 255
	maxLabels   = 127
	maxPointers = 0xC000

	typeOPT    = 41
	classIN    = 1
	opcodeMask = 0x7800

	flagQR = 1 << 15
	flagAA = 1 << 10
	flagTC = 1 << 9
	flagRD = 1 << 8
	flagRA = 1 << 7
	flagAD = 1 << 5
	flagCD = 1 << 4

	flagDO = 1 << 15 // of EDNS
)

// Errors of Parse. ErrIgnore means that no answer may be sent; the others have a response
// code.
var (
	ErrIgnore  = errors.New("not a query")
	ErrFormat  = errors.New("malformed query")
	ErrOpcode  = errors.New("not implemented")
	ErrVersion = errors.New("unknown version of EDNS")
)

// Query is a parsed query. It is meant to be reused: Parse overwrites all of it. It keeps
// no reference to the packet.
type Query struct {
	ID    uint16
	Type  uint16
	Class uint16
	EDNS  bool
	DO    bool // the client requests DNSSEC records
	AD    bool // the client understands the AD flag
	RD    bool
	CD    bool

	udpSize  uint16
	nameLen  int
	labels   int
	name     [maxName]byte   // lower case, wire format, with the root label
	original [maxName]byte   // the same in the client's case
	labelAt  [maxLabels]byte // where labels begin
	question bool            // the question is valid
}

// Parse parses a packet. After an error other than ErrIgnore, the fields that were parsed
// are sufficient for an error reply.
func (q *Query) Parse(p []byte) error {
	q.question, q.EDNS, q.nameLen, q.labels = false, false, 0, 0
	q.DO, q.udpSize = false, 0
	if len(p) < headerLen {
		return ErrIgnore
	}
	flags := binary.BigEndian.Uint16(p[2:])
	if flags&flagQR != 0 {
		return ErrIgnore
	}
	q.ID = binary.BigEndian.Uint16(p)
	q.RD, q.AD, q.CD = flags&flagRD != 0, flags&flagAD != 0, flags&flagCD != 0
	if flags&opcodeMask != 0 {
		return ErrOpcode
	}
	if binary.BigEndian.Uint16(p[4:]) != 1 || binary.BigEndian.Uint32(p[6:]) != 0 {
		return ErrFormat // not exactly one question, or records in the answer section
	}
	at, ok := q.readName(p)
	if !ok || len(p) < at+4 {
		return ErrFormat
	}
	q.Type = binary.BigEndian.Uint16(p[at:])
	q.Class = binary.BigEndian.Uint16(p[at+2:])
	q.question = true
	return q.readAdditional(p, at+4, int(binary.BigEndian.Uint16(p[10:])))
}

// readName parses the question's name, which cannot be compressed.
func (q *Query) readName(p []byte) (next int, ok bool) {
	at, n := headerLen, 0
	for {
		if at >= len(p) {
			return 0, false
		}
		l := int(p[at])
		if l > 63 || at+1+l > len(p) || n+1+l > maxName {
			return 0, false
		}
		copy(q.original[n:], p[at:at+1+l])
		if l == 0 {
			n++
			at++
			break
		}
		q.labelAt[q.labels] = byte(n)
		q.labels++
		n += 1 + l
		at += 1 + l
	}
	q.nameLen = n
	// Length bytes are below 64 and letters above, so the whole name can be lowered without
	// regard to labels.
	for i, c := range q.original[:n] {
		if c >= 'A' && c <= 'Z' {
			c += 'a' - 'A'
		}
		q.name[i] = c
	}
	return at, true
}

// readAdditional looks for the OPT record and ignores all others.
func (q *Query) readAdditional(p []byte, at, count int) error {
	for range count {
		next, ok := skipName(p, at)
		if !ok || len(p) < next+10 {
			return ErrFormat
		}
		end := next + 10 + int(binary.BigEndian.Uint16(p[next+8:]))
		if end > len(p) {
			return ErrFormat
		}
		if binary.BigEndian.Uint16(p[next:]) == typeOPT {
			if q.EDNS || p[at] != 0 {
				return ErrFormat // at most one, owned by the root
			}
			q.EDNS = true
			q.udpSize = binary.BigEndian.Uint16(p[next+2:])
			q.DO = binary.BigEndian.Uint16(p[next+6:])&flagDO != 0
			if p[next+5] != 0 {
				return ErrVersion
			}
		}
		at = end
	}
	return nil
}

// skipName returns the offset after the name at an offset.
func skipName(p []byte, at int) (next int, ok bool) {
	for at < len(p) {
		switch l := int(p[at]); {
		case l == 0:
			return at + 1, true
		case l >= 0xC0:
			return at + 2, at+2 <= len(p)
		case l > 63:
			return 0, false
		default:
			at += 1 + l
		}
	}
	return 0, false
}

// Name returns the name of the query: lower case, in wire format, ending with the root
// label. It is valid until the next Parse.
func (q *Query) Name() []byte { return q.name[:q.nameLen] }

// OriginalName returns the name in the client's case.
func (q *Query) OriginalName() []byte { return q.original[:q.nameLen] }

// Labels returns the number of labels of the name, without the root.
func (q *Query) Labels() int { return q.labels }

// Label returns a label of the name, counted from the left.
func (q *Query) Label(i int) []byte {
	at := int(q.labelAt[i])
	return q.name[at+1 : at+1+int(q.name[at])]
}

// From returns the suffix of the name that begins with a label: 0 for the whole name.
func (q *Query) From(label int) []byte {
	if label >= q.labels {
		return q.name[q.nameLen-1 : q.nameLen]
	}
	return q.name[q.labelAt[label]:q.nameLen]
}

// Below returns the number of labels in the name before the zone (in wire format, with the
// given number of labels), or -1 if the name is not in the zone.
func (q *Query) Below(zone string, labels int) int {
	n := q.labels - labels
	if n < 0 || string(q.From(n)) != zone {
		return -1
	}
	return n
}

// SetName replaces the question, for queries of the resolver's own. Name is in wire format
// and lower case.
func (q *Query) SetName(name string, qtype uint16) bool {
	if len(name) == 0 || len(name) > maxName {
		return false
	}
	q.labels = 0
	for at := 0; ; {
		l := int(name[at])
		if l == 0 {
			if at+1 != len(name) {
				return false
			}
			break
		}
		if l > 63 || at+1+l >= len(name) {
			return false
		}
		q.labelAt[q.labels] = byte(at)
		q.labels++
		at += 1 + l
	}
	q.nameLen = copy(q.name[:], name)
	copy(q.original[:], name)
	q.Type, q.Class, q.question = qtype, classIN, true
	return true
}

// AppendKey appends the cache key of the query: all fields on which the answer depends.
func (q *Query) AppendKey(b []byte) []byte {
	b = append(b, q.Name()...)
	var flags byte
	if q.DO {
		flags |= 1
	}
	if q.CD {
		flags |= 2
	}
	return append(b, byte(q.Type>>8), byte(q.Type), flags)
}

// Limits of answers over UDP: the length that every client accepts, and the length that
// passes every link without fragmentation.
const (
	minUDP = 512
	maxUDP = 1232
)

// UDPLimit returns the maximum length of an answer over UDP.
func (q *Query) UDPLimit() int { return max(minUDP, min(int(q.udpSize), maxUDP)) }
