package message

import (
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
	"golang.org/x/net/dns/dnsmessage"
)

// BenchmarkCodec parses a query and writes an answer with one address: with this package, and with the two libraries that
// could replace it. See docs/decisions/libraries.md.
func BenchmarkCodec(b *testing.B) {
	packet, err := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA).SetEdns0(1232, false).Pack()
	if err != nil {
		b.Fatal(err)
	}
	for _, codec := range []struct {
		name string
		// answer returns the answer to packet, in buf if it can.
		answer func(buf []byte) ([]byte, error)
	}{
		{"kedge", func(buf []byte) ([]byte, error) {
			if err := benchQuery.Parse(packet); err != nil {
				return nil, err
			}
			benchReply.Begin(&benchQuery, buf, cap(buf))
			benchReply.Addr(0, 5, netip.AddrFrom4([4]byte{10, 43, 0, 10}))
			return benchReply.Finish(), nil
		}},
		{"miekg/dns", func(buf []byte) ([]byte, error) {
			var q dns.Msg
			if err := q.Unpack(packet); err != nil {
				return nil, err
			}
			a := new(dns.Msg).SetReply(&q).SetEdns0(1232, false)
			a.Compress = true
			a.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 5}, A: net.IPv4(10, 43, 0, 10)}}
			return a.PackBuffer(buf[:cap(buf)])
		}},
		{"dnsmessage", func(buf []byte) ([]byte, error) {
			var p dnsmessage.Parser
			h, err := p.Start(packet)
			if err != nil {
				return nil, err
			}
			q, err := p.Question()
			if err != nil {
				return nil, err
			}
			a := dnsmessage.NewBuilder(buf[:0], dnsmessage.Header{ID: h.ID, Response: true, Authoritative: true, RecursionDesired: h.RecursionDesired})
			a.EnableCompression()
			if err := a.StartQuestions(); err != nil {
				return nil, err
			}
			if err := a.Question(q); err != nil {
				return nil, err
			}
			if err := a.StartAnswers(); err != nil {
				return nil, err
			}
			if err := a.AResource(dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 5}, dnsmessage.AResource{A: [4]byte{10, 43, 0, 10}}); err != nil {
				return nil, err
			}
			return a.Finish()
		}},
	} {
		b.Run(codec.name, func(b *testing.B) {
			buf := make([]byte, 0, 1232)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := codec.answer(buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The resolver's goroutines use theirs again for each query, too.
var (
	benchQuery Query
	benchReply Reply
)
