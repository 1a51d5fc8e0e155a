package servers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"syscall"
)

// maxReadyz bounds the answer to a probe: a server that is not ready lists its checks.
const maxReadyz = 64 << 10

// notReady is a server's answer that it is not ready.
type notReady struct{ status string }

func (e notReady) Error() string { return "/readyz answers " + e.status }

// definite reports whether the server, or its machine, has answered.
func definite(err error) bool {
	return errors.As(err, &notReady{}) || errors.Is(err, syscall.ECONNREFUSED)
}

// ProbeReady asks the server at host, which may have a port, once whether its API is ready. The client decides how the server
// is reached and authenticated, and how long the answer may take.
func ProbeReady(ctx context.Context, client *http.Client, host string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+host+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, io.LimitReader(resp.Body, maxReadyz)); err != nil {
		return fmt.Errorf("read the answer of /readyz: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return notReady{resp.Status}
	}
	return nil
}
