package lastbytes

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const size = 2 << 20

// pair returns both ends of a connection whose receiver takes little at a time, so that much
// is under way when the sender closes.
func pair(t *testing.T) (sender, receiver *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d := net.Dialer{}
	conn, err := d.DialContext(context.Background(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); accepted.Close() })
	sender, receiver = accepted.(*net.TCPConn), conn.(*net.TCPConn)
	if err := errors.Join(sender.SetWriteBuffer(2*size), receiver.SetReadBuffer(64<<10)); err != nil {
		t.Fatal(err)
	}
	return sender, receiver
}

// afterClose sends to a sender that has written all and closed, and returns how much arrives.
func afterClose(t *testing.T, sender net.Conn, receiver net.Conn) (int, error) {
	t.Helper()
	wrote := make(chan error, 1)
	go func() {
		_, err := sender.Write(make([]byte, size))
		wrote <- errors.Join(err, sender.Close())
	}()
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	got := 0
	buf := make([]byte, 16<<10)
	for {
		if _, err := receiver.Write([]byte("ping")); err != nil && got < size {
			return got, err
		}
		n, err := receiver.Read(buf)
		got += n
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
}

func TestResetLosesBytes(t *testing.T) {
	sender, receiver := pair(t)
	if n, err := afterClose(t, sender, receiver); err == nil || n == size {
		t.Skipf("this kernel delivers %d bytes (%v) without help", n, err)
	}
}

func TestLinger(t *testing.T) {
	sender, receiver := pair(t)
	if n, err := afterClose(t, Linger(sender), receiver); n != size || err != nil {
		t.Errorf("%d bytes arrive, and then %v, want %d", n, err, size)
	}
	receiver.Close()
}

func TestGuard(t *testing.T) {
	sender, receiver := pair(t)
	guarded := Guard(receiver)
	if guarded == net.Conn(receiver) {
		t.Skip("the kernel does not tell of sockets")
	}
	if n, err := afterClose(t, sender, guarded); n != size || err != nil {
		t.Errorf("%d bytes arrive, and then %v, want %d", n, err, size)
	}
}

// TestGuardBeforeAccept: a connection is there before the program at the other end takes it.
func TestGuardBeforeAccept(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skip(err)
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if Guard(conn) == conn {
		t.Error("the connection is not guarded")
	}
}

// TestGuardSends: while the other end is open everything is sent, whatever waits.
func TestGuardSends(t *testing.T) {
	sender, receiver := pair(t)
	guarded := Guard(receiver)
	for range 3 {
		if _, err := sender.Write([]byte("waits")); err != nil {
			t.Fatal(err)
		}
		if _, err := guarded.Write([]byte("typed")); err != nil {
			t.Fatal(err)
		}
		if err := sender.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(sender, make([]byte, 5)); err != nil {
			t.Fatalf("what was sent has not arrived: %v", err)
		}
	}
	if err := sender.CloseWrite(); err != nil { // it still reads
		t.Fatal(err)
	}
	if _, err := guarded.Write([]byte("typed")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(sender, make([]byte, 5)); err != nil {
		t.Fatalf("what was sent after the end of the other direction has not arrived: %v", err)
	}
}

// TestHandler: a connection that a handler takes over lingers, with TLS too.
func TestHandler(t *testing.T) {
	server := httptest.NewUnstartedServer(Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := conn.Write(bytes.Repeat([]byte{'x'}, size)); err != nil {
			t.Error(err)
		}
		conn.Close()
	})))
	server.StartTLS()
	defer server.Close()
	raw, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := raw.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, &tls.Config{InsecureSkipVerify: true}) // #nosec G402 -- the test's own
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	got, buf := 0, make([]byte, 16<<10)
	r := bufio.NewReader(conn)
	for {
		if _, err := conn.Write([]byte("ping")); err != nil && !errors.Is(err, unix.EPIPE) {
			t.Fatalf("after %d bytes: %v", got, err)
		}
		n, err := r.Read(buf)
		got += n
		if err != nil {
			break
		}
	}
	if got != size {
		t.Errorf("%d bytes arrive, want %d", got, size)
	}
}
