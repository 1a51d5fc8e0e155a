package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"kedge/network/cniclient"
)

const (
	// maxRequest is far more than any runtime sends.
	maxRequest = 4 << 20
	// requestTimeout bounds the waiting for a slow or silent client.
	requestTimeout = 30 * time.Second
)

// Listen opens the socket that the plugin connects to. Only root may.
func Listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen for CNI requests: %w", err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen for CNI requests: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen for CNI requests: %w", err), l.Close())
	}
	return l, nil
}

// Serve answers requests until ctx is cancelled, and closes the listener. It
// returns when those under way are answered.
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
	if err := conn.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return
	}
	var req cniclient.Request
	if err := json.NewDecoder(io.LimitReader(conn, maxRequest)).Decode(&req); err != nil {
		p.log.Warn("CNI request not understood", "error", err)
		return
	}
	resp := p.Handle(ctx, req)
	if resp.Failed {
		p.log.Warn("CNI request failed", "command", req.Command, "container", req.ContainerID, "answer", string(resp.Output))
	}
	// A client that went away repeats its request, and both ADD and DEL may be
	// repeated.
	if err := json.NewEncoder(conn).Encode(resp); err != nil {
		p.log.Debug("CNI answer not sent", "command", req.Command, "error", err)
	}
}
