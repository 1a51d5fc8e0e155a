package dns

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"kedge/dns/cluster"
	"kedge/dns/custom"
	"kedge/dns/message"
	"kedge/dns/outside"
	"kedge/dns/stats"
)

// hostsTTL is the TTL of answers from the ConfigMap, in seconds.
const hostsTTL = 30

// maxAliases is the maximum length of a chain of aliases.
const maxAliases = 8

// answerer answers queries: from the ConfigMap, from the cluster's names, and from upstream
// servers.
type answerer struct {
	log     *slog.Logger
	index   *cluster.Index
	nodes   *nodes
	outside *outside.Resolver
	rules   atomic.Pointer[custom.Rules] // never nil
	stats   *stats.Stats
	ttl     uint32        // of the cluster's records
	waiting chan struct{} // has one element for each UDP query that waits for an upstream server
}

// request is one query with its reply; it is reused for the next query.
type request struct {
	query     message.Query
	reply     message.Reply
	transport stats.Transport
	tcp       bool
	began     time.Time
	querySize int // bytes
}

// answerLocally answers a packet if that needs no upstream server. A nil answer with done
// means that no answer may be sent. If it is not done, answerRemotely continues.
func (a *answerer) answerLocally(w *request, packet, buf []byte) (answer []byte, done bool) {
	defer a.recover(&answer, &done)
	w.querySize = len(packet)
	q := &w.query
	if err := q.Parse(packet); err != nil {
		if err == message.ErrIgnore {
			return nil, true
		}
		return a.record(w, stats.NoSource, false, message.Refusal(q, buf, err)), true
	}
	r := &w.reply
	r.Begin(q, buf, w.limit())
	switch {
	case q.Class != dns.ClassINET, q.Type == dns.TypeAXFR, q.Type == dns.TypeIXFR:
		r.SetRcode(message.Refused)
		return a.record(w, stats.NoSource, false, r.Finish()), true
	case q.Type == dns.TypeHINFO && a.outside.IsLoopProbe(q):
		r.SetRcode(message.Refused)
		return a.record(w, stats.NoSource, false, r.Finish()), true
	}
	by, out := a.local(q, r)
	switch out {
	case localAnswer:
		return a.record(w, by, by == stats.Cluster, r.Finish()), true
	case localAlias:
		return nil, false
	}
	if out, ok := a.outside.Cached(q, buf, w.limit()); ok {
		return a.record(w, stats.Cached, false, out), true
	}
	return nil, false
}

// localResult is the result of a lookup without upstream servers.
type localResult int

const (
	localNone localResult = iota
	localAnswer
	localAlias // an alias whose target must be looked up
)

// local answers from the ConfigMap, the cluster's names and the names of nodes.
func (a *answerer) local(q *message.Query, r *message.Reply) (stats.Source, localResult) {
	rules := a.rules.Load()
	if !rules.Empty() {
		if host(rules, q, r) {
			return stats.Hosts, localAnswer
		}
		if _, ok := rules.Rewrite(q); ok {
			return stats.Hosts, localAlias
		}
	}
	switch v, _ := a.index.Answer(q, r); v {
	case cluster.Answered:
		return stats.Cluster, localAnswer
	case cluster.Alias:
		if q.Type == message.TypeCNAME || q.Type == message.TypeANY {
			return stats.Cluster, localAnswer
		}
		return stats.Cluster, localAlias
	}
	if a.nodes.answer(q, r, a.ttl) {
		return stats.Cluster, localAnswer
	}
	return stats.NoSource, localNone
}

// host answers from the ConfigMap's hosts. A name defined there has no other records.
func host(rules *custom.Rules, q *message.Query, r *message.Reply) bool {
	if q.Type == message.TypePTR {
		if p, ok := q.Reverse(); ok && p.IsSingleIP() {
			if name, ok := rules.Pointer(p.Addr()); ok {
				r.Authoritative()
				return r.Pointer(hostsTTL, message.Name{name})
			}
		}
		return false
	}
	addrs, ok := rules.Host(q)
	if !ok {
		return false
	}
	addresses(addrs, q, r, hostsTTL)
	return true
}

// answerRemotely answers the queries that answerLocally could not.
func (a *answerer) answerRemotely(ctx context.Context, w *request, buf []byte) (answer []byte) {
	var done bool
	defer a.recover(&answer, &done)
	q := &w.query
	if _, out := a.local(q, newReply(w, buf)); out == localAlias {
		return a.record(w, stats.Cluster, true, a.follow(ctx, w, buf))
	}
	return a.record(w, stats.Forwarded, false, a.outside.Resolve(ctx, q, buf, w.limit()))
}

// refuse answers when too many queries are waiting.
func (a *answerer) refuse(w *request, buf []byte) []byte {
	r := newReply(w, buf)
	r.SetRcode(message.ServFail)
	a.stats.Cache(outside.Overload)
	return a.record(w, stats.NoSource, false, r.Finish())
}

// newReply returns the empty reply of w.
func newReply(w *request, buf []byte) *message.Reply {
	w.reply.Begin(&w.query, buf, w.limit())
	return &w.reply
}

// follow answers a query for an alias: the alias record, and the records of its target. It
// is rare, so it uses the general message library.
func (a *answerer) follow(ctx context.Context, w *request, buf []byte) []byte {
	m := new(dns.Msg)
	m.Response, m.RecursionAvailable = true, true
	m.RecursionDesired, m.CheckingDisabled, m.Id = w.query.RD, w.query.CD, w.query.ID
	name := func(wire []byte) string { s, _, _ := dns.UnpackDomainName(wire, 0); return s }
	owner := name(w.query.OriginalName())
	m.Question = []dns.Question{{Name: owner, Qtype: w.query.Type, Qclass: dns.ClassINET}}
	m.Compress = true

	q := w.query // takes each name of the chain in turn
	var r message.Reply
	for range maxAliases {
		target, ttl, ok := a.aliasOf(&q, &r)
		if !ok {
			m.Rcode = a.resolveTarget(ctx, &q, m)
			break
		}
		next := name([]byte(target))
		m.Answer = append(m.Answer, &dns.CNAME{Hdr: dns.RR_Header{Name: owner, Rrtype: dns.TypeCNAME, Class: dns.ClassINET, Ttl: ttl}, Target: next})
		owner = next
		if !q.SetName(target, w.query.Type) {
			m.Rcode = dns.RcodeServerFailure
			break
		}
		if w.query.Type == message.TypeCNAME {
			break
		}
		m.Rcode = dns.RcodeServerFailure // stays if the chain is too long
	}
	if w.query.EDNS {
		m.SetEdns0(uint16(w.query.UDPLimit()), w.query.DO)
	}
	m.Truncate(w.limit())
	out, err := m.PackBuffer(buf)
	if err != nil {
		r.Begin(&w.query, buf, w.limit())
		r.SetRcode(message.ServFail)
		return r.Finish()
	}
	return out
}

// aliasOf returns the target of q's name in wire format, if the name is an alias.
func (a *answerer) aliasOf(q *message.Query, r *message.Reply) (target string, ttl uint32, ok bool) {
	r.Begin(q, nil, message.MaxTCP)
	rules := a.rules.Load()
	if host(rules, q, r) {
		return "", 0, false
	}
	if target, ok := rules.Rewrite(q); ok {
		return target, hostsTTL, true
	}
	v, target := a.index.Answer(q, r)
	return target, a.ttl, v == cluster.Alias
}

// resolveTarget adds the answer for the end of an alias chain to m and returns its response
// code.
func (a *answerer) resolveTarget(ctx context.Context, q *message.Query, m *dns.Msg) int {
	var r message.Reply
	r.Begin(q, nil, message.MaxTCP)
	var out []byte
	if _, res := a.local(q, &r); res == localAnswer {
		out = r.Finish()
	} else {
		out = a.outside.Resolve(ctx, q, nil, message.MaxTCP)
	}
	end := new(dns.Msg)
	if err := end.Unpack(out); err != nil {
		return dns.RcodeServerFailure
	}
	m.Answer = append(m.Answer, end.Answer...)
	m.Ns = append(m.Ns, end.Ns...)
	return end.Rcode
}

// record updates the metrics with an answer and returns it.
func (a *answerer) record(w *request, by stats.Source, ours bool, answer []byte) []byte {
	rcode := 0
	if len(answer) > 3 {
		rcode = int(answer[3] & 0xF)
	}
	a.stats.Answered(by, ours, w.transport, w.query.Type, w.query.DO, rcode, w.querySize, len(answer), time.Since(w.began))
	return answer
}

// recover keeps a query that causes a panic from ending the process, and with it the whole
// node. The client gets no answer; the log gets the reason.
func (a *answerer) recover(answer *[]byte, done *bool) {
	if p := recover(); p != nil {
		a.stats.Panicked()
		a.log.Error("a query made the resolver panic", "err", fmt.Sprint(p), "stack", string(debug.Stack()))
		*answer, *done = nil, true
	}
}
