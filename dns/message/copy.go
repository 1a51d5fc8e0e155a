package message

import "encoding/binary"

// Copy writes a complete answer in wire format, stored for the same question in lower case
// and without an OPT record, as the answer to q. An answer that is too long is truncated at
// the end of a record of the answer section: ends has these offsets.
func Copy(q *Query, buf, answer []byte, ends []uint16, limit int) []byte {
	if q.EDNS {
		limit -= optLen
	}
	out := append(buf[:0], answer...)
	binary.BigEndian.PutUint16(out, q.ID)
	flags := binary.BigEndian.Uint16(answer[2:])&(flagAD|flagTC|flagAA|0xF) | flagQR | flagRA
	if q.RD {
		flags |= flagRD
	}
	if q.CD {
		flags |= flagCD
	}
	if !q.AD && !q.DO {
		flags &^= flagAD // RFC 6840, section 5.8
	}
	// Names in the records that share a suffix with the question refer to it.
	copy(out[headerLen:], q.OriginalName())
	if len(out) > limit {
		flags |= flagTC
		end, n := headerLen+q.nameLen+4, 0
		for n < len(ends) && int(ends[n]) <= limit {
			end = int(ends[n])
			n++
		}
		out = out[:end]
		binary.BigEndian.PutUint16(out[6:], uint16(n))
		binary.BigEndian.PutUint32(out[8:], 0)
	}
	binary.BigEndian.PutUint16(out[2:], flags)
	if q.EDNS {
		out = appendOPT(out, q, 0)
		binary.BigEndian.PutUint16(out[10:], binary.BigEndian.Uint16(out[10:])+1)
	}
	return out
}

// Layout returns the offsets of an answer's TTLs and of the ends of the records of its
// answer section. It fails for malformed messages and messages without exactly one
// question.
func Layout(answer []byte) (ttls, ends []uint16, ok bool) {
	if len(answer) < headerLen || len(answer) > MaxTCP || binary.BigEndian.Uint16(answer[4:]) != 1 {
		return nil, nil, false
	}
	at, ok := skipName(answer, headerLen)
	at += 4
	for section := 6; section <= 10 && ok; section += 2 {
		for range binary.BigEndian.Uint16(answer[section:]) {
			if at, ok = skipName(answer, at); !ok || at+10 > len(answer) {
				return nil, nil, false
			}
			ttls = append(ttls, uint16(at+4))
			at += 10 + int(binary.BigEndian.Uint16(answer[at+8:]))
			if section == 6 {
				ends = append(ends, uint16(at))
			}
		}
	}
	return ttls, ends, ok && at == len(answer)
}
