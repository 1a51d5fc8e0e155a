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

	"github.com/miekg/dns"
)

const (
	// attemptTimeout is how long one attempt with one server may take. Servers that
	// must ask far away need one or two seconds.
	attemptTimeout = 2 * time.Second

	// udpSize is what servers are told that we take, as in package message.
	udpSize = 1232

	// failuresUntilDown in a row make a server suspect; a probe decides.
	failuresUntilDown = 2

	firstProbe = 500 * time.Millisecond
	lastProbe  = time.Minute
	// demandProbe is how often a server that is down is tried while somebody asks.
	demandProbe = time.Second
)

// errMalformed is an answer that cannot be read.
var errMalformed = errors.New("malformed answer")

// upstream is one name server.
type upstream struct {
	addr  netip.AddrPort
	log   *slog.Logger
	watch Watcher
	kick  chan struct{} // asks for a probe at once; holds one request
	gone  chan struct{} // closed when the server is not to be asked any more

	mu        sync.Mutex // guards what follows
	failures  int        // in a row
	down      bool
	lastReply time.Time
	latency   time.Duration // of late, a moving average
}

func newUpstream(addr netip.AddrPort, watch Watcher, log *slog.Logger) *upstream {
	return &upstream{addr: addr, log: log, watch: watch, kick: make(chan struct{}, 1), gone: make(chan struct{})}
}

// isDown says whether the server is known not to answer, and sees to it that this
// is found out anew.
func (u *upstream) isDown() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.down {
		select {
		case u.kick <- struct{}{}:
		default:
		}
	}
	return u.down
}

// patience is how long to wait for this server before another one is asked too.
func (u *upstream) patience() time.Duration {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.latency == 0 {
		return 400 * time.Millisecond
	}
	return min(max(4*u.latency, 250*time.Millisecond), time.Second)
}

// ask sends a question and waits for its answer.
func (u *upstream) ask(ctx context.Context, m *dns.Msg) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	began := time.Now()
	answer, err := exchange(ctx, u.addr, m)
	if err == nil && (answer.Rcode == dns.RcodeFormatError || answer.Rcode == dns.RcodeNotImplemented) && m.IsEdns0() != nil {
		plain := m.Copy() // some old forwarders know no EDNS
		plain.Extra = nil
		answer, err = exchange(ctx, u.addr, plain)
	}
	took := time.Since(began)
	u.note(began, took, err)
	rcode := -1
	if err == nil {
		rcode = answer.Rcode
	}
	u.watch.Exchanged(u.addr, took, rcode)
	return answer, err
}

// note keeps what an attempt says about the server. A name whose own servers are dead
// makes every forwarder silent; that says nothing when it has answered others since.
func (u *upstream) note(began time.Time, took time.Duration, err error) {
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
		u.log.Warn("name server does not answer", "server", u.addr, "cause", err)
		u.watch.Unhealthy(u.addr)
		go u.probe()
	}
}

// probe asks a server that is down until it answers or is not wanted any more. While
// nobody wants to know, it asks ever less often.
func (u *upstream) probe() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	pause, last := firstProbe, time.Time{}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-u.gone:
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
		timer.Reset(pause)
		pause = min(2*pause, lastProbe)
	}
}

// alive asks what every name server can answer.
func (u *upstream) alive(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	m := new(dns.Msg)
	m.SetQuestion(".", dns.TypeNS)
	_, err := exchange(ctx, u.addr, m)
	return err == nil
}

// exchange asks over UDP, and over TCP when the answer does not fit.
func exchange(ctx context.Context, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	answer, err := exchangeOver(ctx, "udp", to, m)
	if err == nil && answer.Truncated {
		answer, err = exchangeOver(ctx, "tcp", to, m)
	}
	return answer, err
}

// exchangeOver makes one exchange on a socket of its own: the kernel gives each a
// random port, and with a random ID and the question in it, an answer is hard to forge.
func exchangeOver(ctx context.Context, network string, to netip.AddrPort, m *dns.Msg) (*dns.Msg, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, to.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	// Closing ends a read at once, whichever of deadline and cancellation comes first.
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	m = m.Copy() // its ID is ours to change; attempts run at the same time
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
			return answer, nil // what is cut off is asked for again
		case answers(answer, m):
			return nil, fmt.Errorf("%w: %w", errMalformed, err)
		case network == "tcp":
			return nil, errMalformed
		}
		// Not an answer to this question: it may be forged, so the right one may still come.
	}
}

// cause is why ctx ended, if that is what made an operation fail.
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

// answers says whether a message is the answer to a question.
func answers(a, m *dns.Msg) bool {
	if a.Id != m.Id || !a.Response || a.Opcode != dns.OpcodeQuery {
		return false
	}
	if len(a.Question) == 0 { // servers that understood nothing do not repeat it
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
