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

// hostsTTL is how long answers from the ConfigMap may be kept, in seconds.
const hostsTTL = 30

// maxAliases bounds a chain of names that stand for names.
const maxAliases = 8

// answerer is the way of a query: the ConfigMap's names, the cluster's, all others.
type answerer struct {
	log     *slog.Logger
	index   *cluster.Index
	outside *outside.Resolver
	rules   atomic.Pointer[custom.Rules] // never nil
	stats   *stats.Stats
	ttl     uint32        // of the cluster's records
	waiting chan struct{} // one for each query over UDP that waits for another server
}

// work is one query, and what is needed again for the next.
type work struct {
	query     message.Query
	reply     message.Reply
	transport stats.Transport
	tcp       bool
	began     time.Time
	asked     int // bytes
}

// atOnce answers a packet when that needs no other server. A nil answer that is done
// means that none may be sent. What is not done goes on with later.
func (a *answerer) atOnce(w *work, packet, buf []byte) (answer []byte, done bool) {
	defer a.recover(&answer, &done)
	w.asked = len(packet)
	q := &w.query
	if err := q.Parse(packet); err != nil {
		if err == message.ErrIgnore {
			return nil, true
		}
		return a.count(w, stats.Nobody, false, message.Refusal(q, buf, err)), true
	}
	r := &w.reply
	r.Begin(q, buf, w.limit())
	switch {
	case q.Class != dns.ClassINET, q.Type == dns.TypeAXFR, q.Type == dns.TypeIXFR:
		r.Fail(message.Refused)
		return a.count(w, stats.Nobody, false, r.Finish()), true
	case q.Type == dns.TypeHINFO && a.outside.Looped(q):
		r.Fail(message.Refused)
		return a.count(w, stats.Nobody, false, r.Finish()), true
	}
	by, out := a.local(q, r)
	switch out {
	case localAnswer:
		return a.count(w, by, by == stats.Cluster, r.Finish()), true
	case localAlias:
		return nil, false
	}
	if out, ok := a.outside.Cached(q, buf, w.limit()); ok {
		return a.count(w, stats.Cached, false, out), true
	}
	return nil, false
}

// localResult is what this node knows of a name by itself.
type localResult int

const (
	localNothing localResult = iota
	localAnswer
	localAlias // which must be followed
)

// local answers from the ConfigMap and the cluster's names.
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
	return stats.Nobody, localNothing
}

// host answers from the ConfigMap's hosts. A name that is there has no other records.
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
	r.Authoritative()
	for _, addr := range addrs {
		if want := q.Type; want == message.TypeANY || addr.Is4() && want == message.TypeA || addr.Is6() && want == message.TypeAAAA {
			r.Addr(message.Question, hostsTTL, addr)
		}
	}
	return true
}

// later answers what atOnce could not.
func (a *answerer) later(ctx context.Context, w *work, buf []byte) (answer []byte) {
	var done bool
	defer a.recover(&answer, &done)
	q := &w.query
	if _, out := a.local(q, begun(w, buf)); out == localAlias {
		return a.count(w, stats.Cluster, true, a.follow(ctx, w, buf))
	}
	return a.count(w, stats.Forwarded, false, a.outside.Resolve(ctx, q, buf, w.limit()))
}

// refuse answers when too many queries wait.
func (a *answerer) refuse(w *work, buf []byte) []byte {
	r := begun(w, buf)
	r.Fail(message.ServFail)
	a.stats.Cache(outside.Overload)
	return a.count(w, stats.Nobody, false, r.Finish())
}

// begun is w's reply, empty.
func begun(w *work, buf []byte) *message.Reply {
	w.reply.Begin(&w.query, buf, w.limit())
	return &w.reply
}

// follow answers for a name that stands for another one: the alias, and what the other
// name has. Few names are like that, so it takes the general way of writing messages.
func (a *answerer) follow(ctx context.Context, w *work, buf []byte) []byte {
	m := new(dns.Msg)
	m.Response, m.RecursionAvailable = true, true
	m.RecursionDesired, m.CheckingDisabled, m.Id = w.query.RD, w.query.CD, w.query.ID
	name := func(wire []byte) string { s, _, _ := dns.UnpackDomainName(wire, 0); return s }
	owner := name(w.query.Asked())
	m.Question = []dns.Question{{Name: owner, Qtype: w.query.Type, Qclass: dns.ClassINET}}
	m.Compress = true

	q := w.query // becomes each name of the chain
	var r message.Reply
	for range maxAliases {
		target, ttl, ok := a.aliasOf(&q, &r)
		if !ok {
			m.Rcode = a.rest(ctx, &q, m)
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
		m.Rcode = dns.RcodeServerFailure // should the chain be too long
	}
	if w.query.EDNS {
		m.SetEdns0(uint16(w.query.UDPLimit()), w.query.DO)
	}
	m.Truncate(w.limit())
	out, err := m.PackBuffer(buf)
	if err != nil {
		r.Begin(&w.query, buf, w.limit())
		r.Fail(message.ServFail)
		return r.Finish()
	}
	return out
}

// aliasOf returns the name that q's stands for, in wire format, if it does.
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

// rest adds the answer for the end of a chain to m and returns its response code.
func (a *answerer) rest(ctx context.Context, q *message.Query, m *dns.Msg) int {
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

// count notes an answer for the metrics and returns it.
func (a *answerer) count(w *work, by stats.Source, ours bool, answer []byte) []byte {
	rcode := 0
	if len(answer) > 3 {
		rcode = int(answer[3] & 0xF)
	}
	a.stats.Answered(by, ours, w.transport, w.query.Type, w.query.DO, rcode, w.asked, len(answer), time.Since(w.began))
	return answer
}

// recover keeps a query that nobody thought of from ending the process, and with it the
// whole node. The client gets no answer; the log gets the reason.
func (a *answerer) recover(answer *[]byte, done *bool) {
	if p := recover(); p != nil {
		a.stats.Panicked()
		a.log.Error("a query made the resolver panic", "cause", fmt.Sprint(p), "stack", string(debug.Stack()))
		*answer, *done = nil, true
	}
}
