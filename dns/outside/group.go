package outside

import (
	"context"
	"errors"
	"time"

	"github.com/miekg/dns"
)

// Errors of a query without an answer.
var (
	errNoServer   = errors.New("no name server is configured")
	errAllDown    = errors.New("no name server answers")
	errAllRefused = errors.New("all name servers returned an error")
)

// maxAttempts limits the cost of one query.
const maxAttempts = 6

// resend is the delay of the retransmission to the only server.
const resend = time.Second

// group is a list of servers for the same names, in order of preference.
type group struct {
	servers []*upstream
}

// healthy returns the servers that are not known to be down, in order.
func (g *group) healthy() []*upstream {
	var out []*upstream
	for _, u := range g.servers {
		if !u.isDown() {
			out = append(out, u)
		}
	}
	return out
}

// ask returns the first good answer. Servers are queried in order, the next one when the
// previous one fails or is slow; a late answer still counts. An error response is returned
// if no other server does better.
func (g *group) ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	if len(g.servers) == 0 {
		return nil, errNoServer
	}
	servers := g.healthy()
	if len(servers) == 0 {
		return nil, errAllDown
	}
	type result struct {
		from   *upstream
		answer *dns.Msg
		err    error
	}
	results := make(chan result, maxAttempts) // buffered: late results have no receiver
	attempts, pending := 0, 0
	// Attempts outlive the query: their results update the health of the server.
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
				next.Reset(u.hedgeDelay())
			} else {
				next.Reset(resend)
			}
		case r := <-results:
			pending--
			if r.err == nil && !isFailure(r.answer) {
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

// isFailure reports whether another server may have a better answer.
func isFailure(m *dns.Msg) bool {
	switch m.Rcode {
	case dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented, dns.RcodeFormatError, dns.RcodeNotZone, dns.RcodeNotAuth:
		return true
	}
	return false
}
