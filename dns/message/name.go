package message

import (
	"net/netip"
	"strings"
)

// WireName converts a name in text form ("web.default.svc", with or without a final dot) to
// wire format in lower case. It returns "" if the name has an empty label, a label of more
// than 63 bytes, or is too long. There are no escapes: labels with dots are not supported.
func WireName(name string) string {
	name = strings.TrimSuffix(name, ".")
	var b strings.Builder
	if name != "" {
		for label := range strings.SplitSeq(name, ".") {
			if label == "" || len(label) > 63 {
				return ""
			}
			b.WriteByte(byte(len(label)))
			b.WriteString(strings.ToLower(label))
		}
	}
	b.WriteByte(0)
	if b.Len() > maxName {
		return ""
	}
	return b.String()
}

// CountLabels returns the number of labels of a name in wire format, without the root.
func CountLabels(wire string) int {
	n := 0
	for at := 0; at < len(wire) && wire[at] != 0; at += 1 + int(wire[at]) {
		n++
	}
	return n
}

// Suffixes of reverse names.
const (
	inAddrArpa = "\x07in-addr\x04arpa\x00"
	ip6Arpa    = "\x03ip6\x04arpa\x00"
)

// Reverse parses a reverse name (10.0.43.10.in-addr.arpa): it returns the address or, for a
// name with fewer labels, the range.
func (q *Query) Reverse() (netip.Prefix, bool) {
	if n := q.Below(inAddrArpa, 2); n >= 0 && n <= 4 {
		var a [4]byte
		for i := range n {
			v, ok := decimal(q.Label(n - 1 - i))
			if !ok {
				return netip.Prefix{}, false
			}
			a[i] = v
		}
		return netip.PrefixFrom(netip.AddrFrom4(a), 8*n), true
	}
	if n := q.Below(ip6Arpa, 2); n >= 0 && n <= 32 {
		var a [16]byte
		for i := range n {
			l := q.Label(n - 1 - i)
			v := hexDigit(l)
			if v < 0 {
				return netip.Prefix{}, false
			}
			a[i/2] |= byte(v) << (4 * (1 - i%2))
		}
		return netip.PrefixFrom(netip.AddrFrom16(a), 4*n), true
	}
	return netip.Prefix{}, false
}

// ReverseZone returns the offset in the name of the zone of a range whose prefix ends at a
// label boundary; other ranges are several zones.
func (q *Query) ReverseZone(r netip.Prefix) int {
	per := 8
	if r.Addr().Is6() {
		per = 4
	}
	label := q.labels - 2 - (r.Bits()+per-1)/per
	return int(q.labelAt[max(label, 0)])
}

// decimal parses one byte of an address, without leading zeros: otherwise a name would have
// two spellings.
func decimal(l []byte) (byte, bool) {
	if len(l) == 0 || len(l) > 3 || len(l) > 1 && l[0] == '0' {
		return 0, false
	}
	v := 0
	for _, c := range l {
		if c < '0' || c > '9' {
			return 0, false
		}
		v = v*10 + int(c-'0')
	}
	return byte(v), v <= 255
}

func hexDigit(l []byte) int {
	if len(l) != 1 {
		return -1
	}
	switch c := l[0]; {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	}
	return -1
}
