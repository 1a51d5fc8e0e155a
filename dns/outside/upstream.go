package outside

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"kedge/internal/lifecycle"

	"github.com/miekg/dns"
)

const (
	// attemptTimeout is the time limit of one attempt with one server. Servers with distant
	// upstreams need one or two seconds.
	attemptTimeout = 2 * time.Second

	// udpSize is the advertised UDP payload size, the same as in package message.
	udpSize = 1232

	// failuresUntilDown is the number of consecutive failures after which a server is down,
	// until a probe succeeds.
	failuresUntilDown = 2

	firstProbe = 500 * time.Millisecond
	lastProbe  = time.Minute
	// demandProbe is the interval of probes of a down server while there are queries.
	demandProbe = time.Second
)

// errMalformed is the error for an invalid answer.
var errMalformed = errors.New("malformed answer")

// upstream is one name server.
type upstream struct {
	addr   netip.AddrPort
	log    *slog.Logger
	watch  Watcher
	kick   lifecycle.Wakeup // requests a probe
	closed chan struct{}    // closed when the server is no longer used

	mu        sync.Mutex // guards what follows
	failures  int        // in a row
	down      bool
	lastReply time.Time
	latency   time.Duration // moving average
}

func newUpstream(addr netip.AddrPort, watch Watcher, log *slog.Logger) *upstream {
	return &upstream{addr: addr, log: log, watch: watch, kick: lifecycle.NewWakeup(), closed: make(chan struct{})}
}

// isDown reports whether the server is down, and requests a probe if so.
func (u *upstream) isDown() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.down {
		u.kick.Wake()
	}
	return u.down
}

// hedgeDelay is the time after which another server is queried too.
func (u *upstream) hedgeDelay() time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.latency == 0 {
		return 400 * time.Millisecond
	}
	return min(max(4*u.latency, 250*time.Millisecond), time.Second)
}

// ask sends a query and waits for its answer.
func (u *upstream) ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	began := time.Now()
	answer, err := exchange(ctx, u.addr, m)
	if err == nil && (answer.Rcode == dns.RcodeFormatError || answer.Rcode == dns.RcodeNotImplemented) && m.IsEdns0() != nil {
		plain := m.Copy() // some old forwarders lack EDNS
		plain.Extra = nil
		answer, err = exchange(ctx, u.addr, plain)
	}
	took := time.Since(began)
	u.recordAttempt(began, took, err)
	rcode := -1
	if err == nil {
		rcode = answer.Rcode
	}
	u.watch.Exchanged(u.addr, took, rcode)
	return answer, err
}

// recordAttempt updates the health of the server. A name whose authoritative servers are
// down makes every forwarder time out; that does not count if the server has answered other
// queries since.
func (u *upstream) recordAttempt(began time.Time, took time.Duration, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if err == nil {
		u.failures, u.lastReply = 0, time.Now()
		if u.latency == 0 {
			u.latency = took
		}
		u.latency += (took - u.latency) / 8
		return
	}
	if errors.Is(err, context.Canceled) || u.lastReply.After(began) {
		return
	}
	u.failures++
	if u.failures >= failuresUntilDown && !u.down {
		u.down = true
		u.log.Warn("name server does not answer", "server", u.addr, "err", err)
		u.watch.Unhealthy(u.addr)
		go u.probe()
	}
}

// probe queries a down server until it answers or is no longer used. Without queries the
// interval grows.
func (u *upstream) probe() {
	ctx, cancel := u.whileUsed()
	defer cancel()
	pause, last := lifecycle.Backoff{First: firstProbe, Last: lastProbe}, time.Time{}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-u.closed:
			return
		case <-u.kick:
			timer.Reset(max(0, demandProbe-time.Since(last)))
			continue
		case <-timer.C:
		}
		last = time.Now()
		if u.alive(ctx) {
			u.mu.Lock()
			u.down, u.failures, u.lastReply = false, 0, time.Now()
			u.mu.Unlock()
			u.log.Info("name server answers again", "server", u.addr)
			return
		}
		timer.Reset(pause.Next())
	}
}

// whileUsed returns a context for queries of the resolver's own, which end with the use of the server. The caller calls the
// function when it has no more queries.
func (u *upstream) whileUsed() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		select {
		case <-u.closed:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// alive sends a query that every name server can answer.
func (u *upstream) alive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	m := new(dns.Msg)
	m.SetQuestion(".", dns.TypeNS)
	_, err := exchange(ctx, u.addr, m)
	return err == nil
}

// exchange sends a query over UDP, and over TCP if the answer is truncated.
func exchange(ctx context.Context, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	answer, err := exchangeOver(ctx, "udp", to, m)
	if err == nil && answer.Truncated {
		answer, err = exchangeOver(ctx, "tcp", to, m)
	}
	return answer, err
}

// exchangeOver makes one exchange on a new socket: the kernel assigns a random port, which
// together with a random ID and the question makes an answer hard to forge.
func exchangeOver(ctx context.Context, network string, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, to.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// The deadline ends a read at once, for the timeout as well as for a cancellation.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	m = m.Copy() // attempts run concurrently, each with its own ID
	m.Id = randomID()
	out, err := m.Pack()
	if err != nil {
		return nil, err
	}
	if network == "tcp" {
		out = append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)
	}
	if _, err := conn.Write(out); err != nil {
		return nil, cause(ctx, err)
	}
	for {
		in, err := receive(conn, network)
		if err != nil {
			return nil, cause(ctx, err)
		}
		answer := new(dns.Msg)
		err = answer.Unpack(in)
		switch {
		case answers(answer, m) && (err == nil || answer.Truncated):
			return answer, nil // a truncated answer is repeated over TCP
		case answers(answer, m):
			return nil, fmt.Errorf("%w: %w", errMalformed, err)
		case network == "tcp":
			return nil, errMalformed
		}
		// Not an answer to this query: it may be forged, so the right one may still arrive.
	}
}

// cause returns why ctx ended, if that made an operation fail.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func receive(conn net.Conn, network string) ([]byte, error) {
	if network == "udp" {
		buf := make([]byte, 4096)
		n, err := conn.Read(buf)
		return buf[:n], err
	}
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, err
	}
	buf := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(conn, buf)
	return buf, err
}

// answers reports whether a is the answer to m.
func answers(a, m *dns.Msg) bool {
	if a.Id != m.Id || !a.Response || a.Opcode != dns.OpcodeQuery {
		return false
	}
	if len(a.Question) == 0 { // servers that could not parse the query do not repeat it
		return a.Rcode == dns.RcodeFormatError || a.Rcode == dns.RcodeNotImplemented
	}
	q, want := a.Question[0], m.Question[0]
	return len(a.Question) == 1 && q.Qtype == want.Qtype && q.Qclass == want.Qclass && strings.EqualFold(q.Name, want.Name)
}

func randomID() uint16 {
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails, see crypto/rand
	return binary.BigEndian.Uint16(b[:])
}
