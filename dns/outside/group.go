package outside

import (
	"context"
	"errors"
	"time"

	"github.com/miekg/dns"
)

// Why there is no answer.
var (
	errNoServer   = errors.New("no name server is configured")
	errAllDown    = errors.New("no name server answers")
	errAllRefused = errors.New("every name server refused")
)

// maxAttempts bounds what one question costs.
const maxAttempts = 6

// resend is after how long a lost packet is sent again where there is no other server.
const resend = time.Second

// group is the servers that are asked for the same names, in order of preference.
type group struct {
	servers []*upstream
}

// up returns the servers that are not known to be down, in order.
func (g *group) up() []*upstream {
	var out []*upstream
	for _, u := range g.servers {
		if !u.isDown() {
			out = append(out, u)
		}
	}
	return out
}

// ask returns the first good answer of a server. Servers are asked one after another,
// the next one when the one before fails or takes long; an answer that comes late is
// still good. A failure that a server reports is returned when no other does better.
func (g *group) ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	if len(g.servers) == 0 {
		return nil, errNoServer
	}
	servers := g.up()
	if len(servers) == 0 {
		return nil, errAllDown
	}
	type result struct {
		from   *upstream
		answer *dns.Msg
		err    error
	}
	results := make(chan result, maxAttempts) // nobody may wait for those that come too late
	attempts, pending := 0, 0
	// Attempts outlive the question: what they learn of the server must be noted.
	attempt := context.WithoutCancel(ctx)
	next := time.NewTimer(0)
	defer next.Stop()
	limit := min(maxAttempts, max(3, 2*len(servers)))
	var refusal *dns.Msg
	failure := errAllRefused
	refused := map[*upstream]bool{}
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-next.C:
			if attempts == limit {
				break
			}
			u := servers[attempts%len(servers)]
			attempts++
			if refused[u] {
				next.Reset(0)
				break
			}
			pending++
			go func() {
				answer, err := u.ask(attempt, m)
				results <- result{u, answer, err}
			}()
			if len(servers) > 1 {
				next.Reset(u.patience())
			} else {
				next.Reset(resend)
			}
		case r := <-results:
			pending--
			if r.err == nil && !bad(r.answer) {
				return r.answer, nil
			}
			if r.err == nil {
				refusal, refused[r.from] = r.answer, true
			} else {
				failure = r.err
			}
			if attempts < min(limit, len(servers)) {
				next.Reset(0)
				break
			}
			if pending == 0 {
				if refusal != nil {
					return refusal, nil
				}
				return nil, failure
			}
		}
	}
}

// bad says whether another server may know better.
func bad(m *dns.Msg) bool {
	switch m.Rcode {
	case dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented, dns.RcodeFormatError, dns.RcodeNotZone, dns.RcodeNotAuth:
		return true
	}
	return false
}
