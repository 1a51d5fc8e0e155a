package message

import (
	"encoding/binary"
	"net/netip"
)

// Record types that this package writes.
const (
	TypeA     = 1
	TypeNS    = 2
	TypeCNAME = 5
	TypeSOA   = 6
	TypePTR   = 12
	TypeTXT   = 16
	TypeAAAA  = 28
	TypeSRV   = 33
	TypeANY   = 255
)

// Rcode is a response code (RFC 1035, 4.1.1).
type Rcode uint8

// Response codes in use.
const (
	NoError  Rcode = 0
	FormErr  Rcode = 1
	ServFail Rcode = 2
	NXDomain Rcode = 3
	NotImp   Rcode = 4
	Refused  Rcode = 5
	badVers        = 16 // in two places: see Finish
)

// MaxTCP is the maximum length of an answer over TCP.
const MaxTCP = 65535

// Owner is the owner of a record: the offset of its name in the message. The query's name
// is Question.
type Owner uint16

// Question is the name in the question. Records refer to it, so that they have the client's
// case.
const Question Owner = headerLen

// Reply writes one reply: call Begin, add records, call Finish. Records that do not fit are
// left out, and the reply is marked as truncated. The zero Reply is ready for Begin.
type Reply struct {
	q       *Query
	buf     []byte
	limit   int // without the OPT record
	counts  [3]uint16
	section int
	flags   uint16
	rcode   uint16
}

const optLen = 11

// Begin starts a reply to q in buf, which is overwritten and grown as needed, of at most
// limit bytes.
func (r *Reply) Begin(q *Query, buf []byte, limit int) {
	*r = Reply{q: q, limit: limit, flags: flagQR | flagRA}
	if q.EDNS {
		r.limit -= optLen
	}
	r.buf = append(buf[:0], make([]byte, headerLen)...)
	if q.question {
		r.buf = append(r.buf, q.OriginalName()...)
		r.buf = binary.BigEndian.AppendUint16(r.buf, q.Type)
		r.buf = binary.BigEndian.AppendUint16(r.buf, q.Class)
	}
}

// Authoritative sets the AA flag.
func (r *Reply) Authoritative() { r.flags |= flagAA }

// SetRcode sets the response code.
func (r *Reply) SetRcode(c Rcode) { r.rcode = uint16(c) }

// Rcode returns the current response code.
func (r *Reply) Rcode() Rcode { return Rcode(r.rcode) }

// Answers returns the number of records in the answer section.
func (r *Reply) Answers() int { return int(r.counts[0]) }

// Authority adds the following records to the authority section.
func (r *Reply) Authority() { r.section = 1 }

// Additional adds the following records to the additional section.
func (r *Reply) Additional() { r.section = 2 }

// begin writes a record up to its data, which will have the given length, and reports
// whether it fits. A missing answer record truncates the message; the other sections may be
// incomplete (RFC 2181, section 9).
func (r *Reply) begin(owner Owner, rtype uint16, ttl uint32, data int) bool {
	if len(r.buf)+12+data > r.limit {
		if r.section == 0 {
			r.flags |= flagTC
		}
		return false
	}
	r.counts[r.section]++
	r.buf = binary.BigEndian.AppendUint16(r.buf, maxPointers|uint16(owner))
	r.buf = binary.BigEndian.AppendUint16(r.buf, rtype)
	r.buf = binary.BigEndian.AppendUint16(r.buf, classIN)
	r.buf = binary.BigEndian.AppendUint32(r.buf, ttl)
	r.buf = binary.BigEndian.AppendUint16(r.buf, uint16(data))
	return true
}

// Addr adds an A or AAAA record.
func (r *Reply) Addr(owner Owner, ttl uint32, a netip.Addr) bool {
	if a.Is4() {
		if !r.begin(owner, TypeA, ttl, 4) {
			return false
		}
		b := a.As4()
		r.buf = append(r.buf, b[:]...)
		return true
	}
	if !r.begin(owner, TypeAAAA, ttl, 16) {
		return false
	}
	b := a.As16()
	r.buf = append(r.buf, b[:]...)
	return true
}

// Name is a name in wire format in parts, the last of which ends with the root label. The
// parts share the memory of the suffixes that most names of a cluster have in common.
type Name [3]string

// Len returns the length of the name in bytes.
func (n Name) Len() int { return len(n[0]) + len(n[1]) + len(n[2]) }

func (r *Reply) name(n Name) {
	r.buf = append(r.buf, n[0]...)
	r.buf = append(r.buf, n[1]...)
	r.buf = append(r.buf, n[2]...)
}

// Alias adds a CNAME record.
func (r *Reply) Alias(ttl uint32, target Name) bool {
	return r.nameRecord(TypeCNAME, ttl, target)
}

// Pointer adds a PTR record.
func (r *Reply) Pointer(ttl uint32, target Name) bool {
	return r.nameRecord(TypePTR, ttl, target)
}

// NameServer adds an NS record and returns its target as an owner.
func (r *Reply) NameServer(ttl uint32, target Name) (Owner, bool) {
	ok := r.nameRecord(TypeNS, ttl, target)
	return Owner(len(r.buf) - target.Len()), ok
}

func (r *Reply) nameRecord(rtype uint16, ttl uint32, target Name) bool {
	if !r.begin(Question, rtype, ttl, target.Len()) {
		return false
	}
	r.name(target)
	return true
}

// Server adds an SRV record (RFC 2782) and returns its target as an owner of
// address records.
func (r *Reply) Server(ttl uint32, weight, port uint16, target Name) (Owner, bool) {
	if !r.begin(Question, TypeSRV, ttl, 6+target.Len()) {
		return 0, false
	}
	r.buf = binary.BigEndian.AppendUint16(r.buf, 0) // priority
	r.buf = binary.BigEndian.AppendUint16(r.buf, weight)
	r.buf = binary.BigEndian.AppendUint16(r.buf, port)
	at := len(r.buf)
	r.name(target)
	return Owner(at), at < 0x4000 // what a compressed name can refer to
}

// Text adds a TXT record of one string.
func (r *Reply) Text(ttl uint32, text string) bool {
	if !r.begin(Question, TypeTXT, ttl, 1+len(text)) {
		return false
	}
	r.buf = append(r.buf, byte(len(text)))
	r.buf = append(r.buf, text...)
	return true
}

// SOA is the content of a SOA record.
type SOA struct {
	Server, Mailbox Name
	Serial          uint32
	Minimum         uint32 // TTL of negative answers in seconds (RFC 2308)
}

// Times of a SOA record that only secondary servers use, in seconds.
const (
	soaRefresh = 7200
	soaRetry   = 1800
	soaExpire  = 86400
)

// StartOfAuthority adds a SOA record; zone is the offset of its owner in the question's
// name.
func (r *Reply) StartOfAuthority(zone int, s SOA) bool {
	if !r.begin(Question+Owner(zone), TypeSOA, s.Minimum, s.Server.Len()+s.Mailbox.Len()+20) {
		return false
	}
	r.name(s.Server)
	r.name(s.Mailbox)
	for _, v := range [5]uint32{s.Serial, soaRefresh, soaRetry, soaExpire, s.Minimum} {
		r.buf = binary.BigEndian.AppendUint32(r.buf, v)
	}
	return true
}

// Finish completes the reply and returns it, in the buffer of Begin.
func (r *Reply) Finish() []byte {
	q, arcount := r.q, r.counts[2]
	if q.EDNS {
		r.buf = appendOPT(r.buf, q, byte(r.rcode>>4))
		arcount++
	}
	flags := r.flags | r.rcode&0xF
	if q.RD {
		flags |= flagRD
	}
	if q.CD {
		flags |= flagCD
	}
	b := r.buf
	binary.BigEndian.PutUint16(b, q.ID)
	binary.BigEndian.PutUint16(b[2:], flags)
	binary.BigEndian.PutUint16(b[4:], 0)
	if q.question {
		b[5] = 1
	}
	binary.BigEndian.PutUint16(b[6:], r.counts[0])
	binary.BigEndian.PutUint16(b[8:], r.counts[1])
	binary.BigEndian.PutUint16(b[10:], arcount)
	return b
}

func appendOPT(b []byte, q *Query, extended byte) []byte {
	b = append(b, 0, 0, typeOPT)
	b = binary.BigEndian.AppendUint16(b, maxUDP)
	b = append(b, extended, 0)
	var flags uint16
	if q.DO {
		flags = flagDO
	}
	b = binary.BigEndian.AppendUint16(b, flags)
	return binary.BigEndian.AppendUint16(b, 0)
}

// Refusal returns the reply to a query that Parse rejected.
func Refusal(q *Query, buf []byte, err error) []byte {
	var r Reply
	r.Begin(q, buf, minUDP)
	switch err {
	case ErrOpcode:
		r.rcode = uint16(NotImp)
	case ErrVersion:
		r.rcode = badVers
	default:
		r.rcode = uint16(FormErr)
	}
	return r.Finish()
}
