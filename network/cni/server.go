package cni

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"kedge/internal/unixsocket"
	"kedge/network/cniclient"
)

const (
	// maxRequest is far more than any runtime sends.
	maxRequest = 4 << 20
	// requestTimeout bounds the wait for the request of a slow or silent client.
	requestTimeout = 30 * time.Second
)

// Listen opens the socket for the plugin. Only root may connect.
func Listen(path string) (net.Listener, error) {
	l, err := unixsocket.ListenPrivate(context.Background(), path)
	if err != nil {
		return nil, fmt.Errorf("listen for CNI requests: %w", err)
	}
	return l, nil
}

// Serve answers requests until ctx is cancelled, and closes the listener. It returns when
// all pending requests are answered.
func (p *Plugin) Serve(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	var open sync.WaitGroup
	defer open.Wait()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept CNI request: %w", err)
		}
		open.Go(func() { p.serveConn(ctx, conn) })
	}
}

func (p *Plugin) serveConn(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	// For the request only: the answer may take longer, and the client waits for it.
	if err := conn.SetReadDeadline(time.Now().Add(requestTimeout)); err != nil {
		return
	}
	var req cniclient.Request
	if err := json.NewDecoder(io.LimitReader(conn, maxRequest)).Decode(&req); err != nil {
		p.log.Warn("malformed CNI request", "err", err)
		return
	}
	resp := p.Handle(ctx, req)
	if resp.Failed {
		p.log.Warn("CNI request failed", "command", req.Command, "container", req.ContainerID, "answer", string(resp.Output))
	}
	// A client that has disconnected repeats its request, and both ADD and DEL may be
	// repeated.
	if err := json.NewEncoder(conn).Encode(resp); err != nil {
		p.log.Debug("CNI answer not sent", "command", req.Command, "err", err)
	}
}
