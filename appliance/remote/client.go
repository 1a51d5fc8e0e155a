package remote

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kedge/appliance"
)

// Client asks one node.
type Client struct {
	// Dial connects to the node's answers.
	Dial func(context.Context) (net.Conn, error)
}

// Time limits of questions.
const (
	askTimeout  = 30 * time.Second
	sendTimeout = 30 * time.Minute // through a slow line
)

// Installed returns the kedge that is installed on the node.
func (c Client) Installed(ctx context.Context) (i Installed, err error) {
	return i, c.ask(ctx, askTimeout, http.MethodGet, "/v1/installed", nil, &i)
}

// Upgrades returns what is known of the upgrades of the node.
func (c Client) Upgrades(ctx context.Context) (s appliance.UpgradeStatus, err error) {
	return s, c.ask(ctx, askTimeout, http.MethodGet, "/v1/upgrades", nil, &s)
}

// Send sends a file of a release.
func (c Client) Send(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return c.ask(ctx, sendTimeout, http.MethodPut, "/v1/files/"+filepath.Base(path), f, nil)
}

// Begin begins the upgrade to the executable that was sent. The node checks it, itself and its configuration first.
func (c Client) Begin(ctx context.Context, b Begin) error {
	data, err := json.Marshal(b)
	if err != nil {
		return err
	}
	return c.ask(ctx, beginTimeout+askTimeout, http.MethodPost, "/v1/upgrade", bytes.NewReader(data), nil)
}

// maxSupport bounds the state of a node, in bytes.
const maxSupport = 256 << 20

// SupportBundle writes what "kedge support-bundle" collects on the node to w.
func (c Client) SupportBundle(ctx context.Context, w io.Writer) error {
	return c.exchange(ctx, supportTimeout+askTimeout, http.MethodGet, "/v1/support-bundle", nil, func(resp *http.Response) error {
		size, err := io.Copy(w, io.LimitReader(resp.Body, maxSupport+1))
		if err == nil && size > maxSupport {
			err = fmt.Errorf("the node sends more than %d MiB", maxSupport>>20)
		}
		return err
	})
}

// maxAnswer bounds an answer, in bytes: a node is not trusted by the servers.
const maxAnswer = 1 << 20

// ask sends a request, and decodes the answer into v unless that is nil.
func (c Client) ask(ctx context.Context, limit time.Duration, method, path string, body io.Reader, v any) error {
	return c.exchange(ctx, limit, method, path, body, func(resp *http.Response) error {
		answer := io.LimitReader(resp.Body, maxAnswer)
		if v == nil {
			_, err := io.Copy(io.Discard, answer)
			return err
		}
		return json.NewDecoder(answer).Decode(v)
	})
}

// exchange sends a request, and calls read with a good answer.
func (c Client) exchange(ctx context.Context, limit time.Duration, method, path string, body io.Reader, read func(*http.Response) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the node has not answered within %s", limit))
	defer cancel()
	client := &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx) },
		DisableKeepAlives: true,
	}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "http://node"+path, body)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return context.Cause(ctx)
		}
		return errors.Unwrap(err) // without the address, which says nothing
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		if err != nil {
			return err
		}
		return &RefusedError{Reason: printable(string(text))}
	}
	return read(resp)
}

// RefusedError is the answer of a node that does not do what it was asked for: asking again does not help.
type RefusedError struct{ Reason string }

// Error is the reason.
func (e *RefusedError) Error() string { return e.Reason }

// printable removes what a terminal would interpret.
func printable(text string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r == 0x7f {
			return -1
		}
		return r
	}, text))
}
