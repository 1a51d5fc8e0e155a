package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/internal/test/await"
)

// pair is a session and both of its ends. Streams go to what dial connects to.
func pair(t testing.TB, opts Options, dial DialFunc) *Opener {
	t.Helper()
	server, node := wire(t)
	o, err := NewOpener(server, opts, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, node, dial, opts, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		<-served
		o.Close(ErrEnded)
	})
	return o
}

// wire is a TCP connection.
func wire(t testing.TB) (a, b net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if a, err = net.Dial("tcp", l.Addr().String()); err == nil {
		b, err = l.Accept()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// service is a TCP server to which every destination leads.
func service(t testing.TB, serve func(*net.TCPConn)) DialFunc {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
	return func(ctx context.Context, _ Destination) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
	}
}

func dial(t testing.TB, o *Opener) net.Conn {
	t.Helper()
	c, err := o.Dial(t.Context(), Destination{Kind: Kubelet})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func echo(c *net.TCPConn) {
	if _, err := io.Copy(c, c); err == nil {
		_ = c.CloseWrite()
	}
}

// blob is data in which every part is different.
func blob(n int) []byte {
	var out []byte
	for sum := sha256.Sum256([]byte("seed")); len(out) < n; sum = sha256.Sum256(sum[:]) {
		out = append(out, sum[:]...)
	}
	return out[:n]
}

func TestManyStreams(t *testing.T) {
	o := pair(t, DefaultOptions(), service(t, echo))
	data := blob(300_000) // more than the window that a stream begins with
	var all sync.WaitGroup
	for range 300 {
		all.Go(func() {
			c, err := o.Dial(t.Context(), Destination{Kind: Kubelet})
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			go func() {
				_, _ = c.Write(data)
				_ = c.(halfCloser).CloseWrite()
			}()
			got, err := io.ReadAll(c)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes came back, want %d as they were; %v", len(got), len(data), err)
			}
		})
	}
	all.Wait()
}

// The end of one direction is passed on, and the other goes on.
func TestHalfClose(t *testing.T) {
	o := pair(t, DefaultOptions(), service(t, func(c *net.TCPConn) {
		question, err := io.ReadAll(c)
		if err == nil {
			_, err = fmt.Fprintf(c, "all of %d bytes", len(question))
		}
		if err != nil {
			t.Error(err)
		}
	}))
	c := dial(t, o)
	if _, err := c.Write(make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := c.(halfCloser).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "all of 1000 bytes" {
		t.Errorf("got %q, %v", got, err)
	}
}

// A reader that reads nothing keeps its own stream back and no other.
func TestSlowReader(t *testing.T) {
	o := pair(t, DefaultOptions(), service(t, func(c *net.TCPConn) {
		kind := make([]byte, 1)
		if _, err := io.ReadFull(c, kind); err != nil {
			return
		}
		if kind[0] == 'e' {
			echo(c)
			return
		}
		_, _ = io.Copy(c, zeros{}) // without end
	}))
	for range 20 {
		if _, err := dial(t, o).Write([]byte("z")); err != nil {
			t.Fatal(err)
		}
	}
	c := dial(t, o)
	data := append([]byte("e"), blob(4<<20)...)
	go func() {
		_, _ = c.Write(data)
		_ = c.(halfCloser).CloseWrite()
	}()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data[1:]) {
		t.Errorf("%d bytes came back beside slow readers, want %d; %v", len(got), len(data)-1, err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// Who closes a stream of which the other end goes on sending is rid of it.
func TestCloseWhileTheOtherEndSends(t *testing.T) {
	opts := DefaultOptions()
	opts.Drain = 100 * time.Millisecond
	ended := make(chan error, 1)
	o := pair(t, opts, service(t, func(c *net.TCPConn) {
		_, err := io.Copy(c, zeros{})
		ended <- err
	}))
	c := dial(t, o)
	if _, err := io.ReadFull(c, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	reading := make(chan error, 1)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := c.Read(make([]byte, 10))
		reading <- err
	}()
	if err := <-reading; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read after Close returns %v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the sender came to an end without an error")
	}
	await.True(t, "the other end has closed the stream", func() bool { return o.s.mux.NumStreams() == 0 })
}

func TestRefusals(t *testing.T) {
	why := map[Kind]error{Kubelet: fmt.Errorf("%w: not today", ErrForbidden), Egress: fmt.Errorf("connect: no\nroute\x1b[31m %s", strings.Repeat("x", 300))}
	o := pair(t, DefaultOptions(), func(_ context.Context, d Destination) (net.Conn, error) { return nil, why[d.Kind] })
	_, err := o.Dial(t.Context(), Destination{Kind: Kubelet})
	if !errors.Is(err, ErrForbidden) || err.Error() != ErrForbidden.Error()+": not today" {
		t.Errorf("got %v", err)
	}
	_, err = o.Dial(t.Context(), Destination{Kind: Egress, Addr: netip.MustParseAddrPort("10.42.0.1:80")})
	if !errors.Is(err, ErrUnreachable) || strings.ContainsAny(err.Error(), "\n\x1b") || len(err.Error()) > 320 {
		t.Errorf("got %q", err)
	}
}

// A node has no more connections open than Options.Streams, and takes new ones when
// old ones have ended.
func TestStreamsAreBounded(t *testing.T) {
	opts := DefaultOptions()
	opts.Streams = 3
	o := pair(t, opts, service(t, echo))
	var open []net.Conn
	for range opts.Streams {
		open = append(open, dial(t, o))
	}
	if _, err := o.Dial(t.Context(), Destination{Kind: Kubelet}); !errors.Is(err, ErrBusy) {
		t.Errorf("one too many: %v", err)
	}
	open[0].Close()
	await.True(t, "there is room again", func() bool {
		c, err := o.Dial(t.Context(), Destination{Kind: Kubelet})
		if err == nil {
			c.Close()
		} else if !errors.Is(err, ErrBusy) {
			t.Fatal(err)
		}
		return err == nil
	})
}

// Streams that a node opens end its session: it has nothing to open them for.
func TestNodeOpensStreams(t *testing.T) {
	server, node := wire(t)
	o, err := NewOpener(server, DefaultOptions(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSession(node, DefaultOptions(), slog.New(slog.DiscardHandler), false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close(ErrEnded)
	go func() { _, _ = s.mux.OpenStream() }()
	<-o.Done()
	if !errors.Is(o.Err(), ErrFrame) {
		t.Errorf("the session ended with %v", o.Err())
	}
}

// A peer that says nothing any more is found, and dials that wait end with it.
func TestDeadPeer(t *testing.T) {
	server, _ := wire(t) // nobody reads or writes at the other end
	opts := DefaultOptions()
	opts.Ping, opts.Silent = 10*time.Millisecond, 50*time.Millisecond
	o, err := NewOpener(server, opts, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Dial(t.Context(), Destination{Kind: Kubelet}); !errors.Is(err, ErrDead) {
		t.Errorf("a dial to nobody ends with %v", err)
	}
	<-o.Done()
	if !errors.Is(o.Err(), ErrDead) {
		t.Errorf("the session ended with %v", o.Err())
	}
}

// A peer that only answers is alive.
func TestIdlePeerIsAlive(t *testing.T) {
	opts := DefaultOptions()
	opts.Ping, opts.Silent = 5*time.Millisecond, 500*time.Millisecond
	o := pair(t, opts, service(t, echo))
	select {
	case <-o.Done():
		t.Errorf("the session ended: %v", o.Err())
	case <-time.After(1200 * time.Millisecond):
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	o := pair(t, DefaultOptions(), func(ctx context.Context, _ Destination) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("nobody wants it any more")
	time.AfterFunc(20*time.Millisecond, func() { cancel(gone) })
	if _, err := o.Dial(ctx, Destination{Kind: Kubelet}); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}

func TestUpgrade(t *testing.T) {
	accepted := make(chan *Opener, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := CheckRequest(r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		conn, err := Accept(w)
		if err != nil {
			t.Error(err)
			return
		}
		o, err := NewOpener(conn, DefaultOptions(), slog.New(slog.DiscardHandler))
		if err != nil {
			t.Error(err)
			return
		}
		accepted <- o
	}))
	defer srv.Close()
	connect := func() net.Conn {
		c, err := net.Dial("tcp", srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	conn, err := Upgrade(t.Context(), connect(), "host")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = Serve(t.Context(), conn, service(t, echo), DefaultOptions(), slog.New(slog.DiscardHandler))
	}()
	o := <-accepted
	defer o.Close(ErrEnded)
	c := dial(t, o)
	if _, err := c.Write([]byte("through")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 7)); err != nil {
		t.Error(err)
	}

	for name, header := range map[string]http.Header{
		"nothing to upgrade to": {}, "another protocol": {"Connection": {"Upgrade"}, "Upgrade": {"websocket"}},
		"a browser": {"Connection": {"Upgrade"}, "Upgrade": {protocol}, "Origin": {"https://example.test"}},
	} {
		req, err := http.NewRequest(http.MethodGet, srv.URL+Path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", name, resp.Status)
		}
	}
}

func TestUpgradeIsRefused(t *testing.T) {
	for name, answer := range map[string]string{
		"a status":         "HTTP/1.1 403 Forbidden\r\nContent-Length: 9\r\n\r\nnot you.\n",
		"another protocol": "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
		"no end":           "HTTP/1.1 101 Switching Protocols\r\nX: " + strings.Repeat("x", 2*maxHeader),
		"nothing":          "",
	} {
		if _, err := readUpgrade(strings.NewReader(answer)); err == nil {
			t.Errorf("%s makes a tunnel", name)
		} else if name == "a status" && (!errors.Is(err, ErrNoUpgrade) || !strings.Contains(err.Error(), "not you.")) {
			t.Errorf("%s: %v", name, err)
		}
	}
	rest, err := readUpgrade(strings.NewReader("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + protocol + "\r\n\r\nabc"))
	if err != nil || string(rest) != "abc" {
		t.Errorf("what follows the answer is %q, %v", rest, err)
	}
}

func FuzzRequest(f *testing.F) {
	for _, d := range []Destination{{Kind: Kubelet}, {Kind: Node}, {Kind: Egress, Addr: netip.MustParseAddrPort("10.42.0.7:8443")}, {Kind: Egress, Addr: netip.MustParseAddrPort("[fd00:42::7]:1")}} {
		var b bytes.Buffer
		if err := writeRequest(&b, d); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Add([]byte{1, 2, 9, '1', '.', '2', '.', '3', '.', '4', ':', '0'})
	f.Add([]byte{1, 2, 200})
	f.Fuzz(func(t *testing.T, data []byte) {
		r := bytes.NewReader(data)
		d, err := readRequest(r)
		if err != nil {
			if !errors.Is(err, ErrFrame) {
				t.Errorf("the error is %v", err)
			}
			return
		}
		// There is one way to ask for a destination, and nothing is read after it.
		var again bytes.Buffer
		if err := writeRequest(&again, d); err != nil {
			t.Fatal(err)
		}
		if used := data[:len(data)-r.Len()]; !bytes.Equal(used, again.Bytes()) {
			t.Errorf("%q is read as %s, which is written %q", used, d, again.Bytes())
		}
	})
}

func FuzzAnswer(f *testing.F) {
	for _, err := range []error{nil, ErrForbidden, ErrBusy, errors.New("no route to host")} {
		var b bytes.Buffer
		if err := writeAnswer(&b, err); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		err := readAnswer(bytes.NewReader(data))
		if err == nil && !bytes.HasPrefix(data, []byte{codeDone, 0}) {
			t.Errorf("%q is taken for a yes", data)
		}
		if r := (*Refusal)(nil); errors.As(err, &r) {
			for _, c := range r.Error() {
				if c < ' ' || c > '~' {
					t.Errorf("the message has %q in it", c)
				}
			}
		}
	})
}

func FuzzUpgrade(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: kedge-tunnel/1\r\n\r\nrest"))
	f.Add([]byte("HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n"))
	f.Add([]byte("HTTP/1.0 101 \n\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		rest, err := readUpgrade(bytes.NewReader(data))
		if err == nil && !bytes.HasSuffix(data[:min(len(data), maxHeader)], rest) {
			t.Errorf("%q follows the answer in %q", rest, data)
		}
	})
}
