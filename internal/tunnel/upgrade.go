package tunnel

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// Path is the path of tunnels on the API's port.
const Path = "/kedge/v1/tunnel"

// protocol is the name in the Upgrade header. A change of the frames or of the streams needs
// another name.
const protocol = "kedge-tunnel/1"

// ErrNoUpgrade is wrapped when a server does not upgrade the connection to a tunnel.
var ErrNoUpgrade = errors.New("the server refuses the tunnel")

const (
	upgradeWithin = 10 * time.Second
	maxHeader     = 8 << 10 // bytes of the server's answer
)

// Upgrade requests an upgrade of conn to a tunnel, and returns the tunnel. It owns conn, also
// when it fails. host is for the request's Host header.
func Upgrade(ctx context.Context, conn net.Conn, host string) (_ net.Conn, err error) {
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(upgradeWithin)); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", Path, host, protocol); err != nil {
		return nil, fmt.Errorf("request a tunnel: %w", err)
	}
	rest, err := readUpgrade(conn)
	if err != nil {
		return nil, err
	}
	if !stop() {
		return nil, context.Cause(ctx)
	}
	return &prefixed{Conn: conn, rest: rest}, conn.SetDeadline(time.Time{})
}

// readUpgrade reads a server's answer, and returns the bytes after it.
func readUpgrade(r io.Reader) (rest []byte, err error) {
	limited := &io.LimitedReader{R: r, N: maxHeader}
	buffered := bufio.NewReader(limited)
	resp, err := http.ReadResponse(buffered, &http.Request{Method: http.MethodGet})
	if err != nil {
		return nil, fmt.Errorf("read the answer to the request for a tunnel: %w", err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		reason, _ := io.ReadAll(io.LimitReader(resp.Body, 500)) // optional
		return nil, fmt.Errorf("%w: it answered %.60q: %q", ErrNoUpgrade, resp.Status, bytes.TrimSpace(reason))
	}
	if !asksFor(resp.Header) {
		return nil, fmt.Errorf("%w: it offers %.60q instead of %q", ErrNoUpgrade, resp.Header.Get("Upgrade"), protocol)
	}
	rest = make([]byte, buffered.Buffered())
	_, err = io.ReadFull(buffered, rest)
	return rest, err
}

func asksFor(h http.Header) bool {
	return strings.EqualFold(h.Get("Connection"), "Upgrade") && h.Get("Upgrade") == protocol
}

// CheckRequest returns an error if a request is not for a tunnel. A browser that another site
// has sent here is refused: it has an Origin header, which nodes do not send.
func CheckRequest(r *http.Request) error {
	switch {
	case r.Method != http.MethodGet, r.ProtoMajor != 1, r.ContentLength != 0, !asksFor(r.Header):
		return fmt.Errorf("%s is for requests to upgrade to %s", Path, protocol)
	case r.Header.Get("Origin") != "":
		return errors.New("no tunnel for browsers")
	}
	return nil
}

// Accept upgrades the connection of a request that [CheckRequest] has accepted to a tunnel. The
// caller has authenticated the node.
func Accept(w http.ResponseWriter) (net.Conn, error) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take the connection of a tunnel: %w", err)
	}
	rest, err := buffered.Reader.Peek(buffered.Reader.Buffered())
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(upgradeWithin))
	}
	if err == nil {
		_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", protocol)
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("answer a request for a tunnel: %w", err)
	}
	return &prefixed{Conn: conn, rest: bytes.Clone(rest)}, nil
}

// prefixed is a connection whose first bytes were read before.
type prefixed struct {
	net.Conn
	rest []byte // read by one goroutine only, as a connection's reader is
}

// Read implements net.Conn.
func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.rest) > 0 {
		n := copy(b, p.rest)
		p.rest = p.rest[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}
