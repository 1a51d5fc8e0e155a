package external

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"kedge/internal/errorkind"
)

// probeWithin bounds the examination of an endpoint.
const probeWithin = 5 * time.Second

// probe returns nil if an etcd answers at the endpoint. An error that is marked as permanent stays until somebody changes the
// settings or the etcd; every other one may pass, as while the etcd is starting. gRPC reports both alike, so the connection is
// examined before.
func (s *Store) probe(ctx context.Context, endpoint string) error {
	ctx, cancel := context.WithTimeout(ctx, probeWithin)
	defer cancel()
	if err := s.examine(ctx, endpoint); err != nil {
		return err
	}
	_, err := s.client.Maintenance.Status(ctx, endpoint)
	return explain(endpoint, err)
}

// examine connects to the endpoint and makes sure that a server for HTTP/2 answers, to which each accepts the other's certificate.
func (s *Store) examine(ctx context.Context, endpoint string) error {
	conn, err := dial(ctx, endpoint)
	if err != nil {
		return fmt.Errorf("%s: %w", endpoint, err)
	}
	defer conn.Close()
	if s.cfg.secure() {
		c, err := s.cfg.tls()
		if err != nil {
			return errorkind.Permanent(err)
		}
		u, err := url.Parse(endpoint)
		if err != nil {
			return err
		}
		c.ServerName, c.NextProtos = u.Hostname(), []string{"h2"}
		secured := tls.Client(conn, c)
		if err := secured.HandshakeContext(ctx); err != nil {
			if hungUp(err) && speaksPlain(ctx, endpoint) {
				return withoutTLS(endpoint)
			}
			return explainTLS(endpoint, err)
		}
		conn = secured
	}
	answer, err := greet(ctx, conn)
	switch {
	case err == nil && answer[3] == settingsFrame:
		return nil
	case err == nil:
		return errorkind.Permanent(fmt.Errorf("%s is not an etcd: it does not answer HTTP/2; check --%s", endpoint, settingEndpoint))
	case s.cfg.secure():
		return explainTLS(endpoint, err)
	case hungUp(err) && speaksTLS(ctx, endpoint):
		return errorkind.Permanent(fmt.Errorf("%s answers with TLS only; write https:// in --%s", endpoint, settingEndpoint))
	}
	return fmt.Errorf("%s: %w", endpoint, err)
}

func dial(ctx context.Context, endpoint string) (net.Conn, error) {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	if u.Scheme == "unix" {
		return (&net.Dialer{}).DialContext(ctx, "unix", u.Path)
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", u.Host)
}

// settingsFrame is the type of the frame with which a server for HTTP/2 begins.
const settingsFrame = 4

// greet begins a connection of HTTP/2, with no settings, and returns the head of the first frame of the server.
func greet(ctx context.Context, conn net.Conn) ([9]byte, error) {
	var head [9]byte
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return head, err
	}
	_, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
	if err == nil {
		_, err = io.ReadFull(conn, head[:])
	}
	return head, err
}

// speaksTLS reports whether the endpoint of a URL without TLS has it. Nothing is sent after the handshake.
func speaksTLS(ctx context.Context, endpoint string) bool {
	conn, err := dial(ctx, endpoint)
	if err != nil {
		return false
	}
	defer conn.Close()
	err = tls.Client(conn, &tls.Config{InsecureSkipVerify: true}).HandshakeContext(ctx)
	return err == nil || fromPeer(err)
}

// speaksPlain reports whether the endpoint of a URL with TLS answers HTTP/2 without.
func speaksPlain(ctx context.Context, endpoint string) bool {
	conn, err := dial(ctx, endpoint)
	if err != nil {
		return false
	}
	defer conn.Close()
	answer, err := greet(ctx, conn)
	return err == nil && answer[3] == settingsFrame
}

func withoutTLS(endpoint string) error {
	return errorkind.Permanent(fmt.Errorf("%s answers without TLS; write http:// in --%s, or turn TLS on there", endpoint, settingEndpoint))
}

// hungUp reports whether the other side has closed a connection without a word. An etcd does so that is asked with TLS and has none, or
// the other way round.
func hungUp(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
}

// fromPeer reports whether the other side has ended a connection with an alert of TLS.
func fromPeer(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

// explainTLS marks the errors of TLS that do not pass by themselves.
func explainTLS(endpoint string, err error) error {
	var noTLS tls.RecordHeaderError
	var verification *tls.CertificateVerificationError
	var unknown x509.UnknownAuthorityError
	switch {
	case errors.As(err, &noTLS):
		return withoutTLS(endpoint)
	case errors.As(err, &unknown):
		err = fmt.Errorf("the certificate of %s is of an authority that this server does not trust (%w); give the file with that authority with --%s", endpoint, err, settingCA)
	case errors.As(err, &verification):
		err = fmt.Errorf("the certificate of %s is not valid for it: %w", endpoint, verification.Err)
	case fromPeer(err):
		err = fmt.Errorf("%s refuses this server's certificate (%w); check --%s and --%s", endpoint, err, settingCert, settingKey)
	default:
		return fmt.Errorf("%s: %w", endpoint, err)
	}
	return errorkind.Permanent(err)
}

// explain marks the answers of a server that is not an etcd, or does not let this server in.
func explain(at string, err error) error {
	switch status.Code(err) {
	case codes.OK:
		return nil
	case codes.Unimplemented, codes.NotFound:
		return errorkind.Permanent(fmt.Errorf("%s is not an etcd: it answers %q; check --%s", at, firstLine(status.Convert(err).Message()), settingEndpoint))
	case codes.Unauthenticated, codes.PermissionDenied:
		return notAllowed(at, err)
	}
	// etcd reports a missing user as an invalid argument.
	if strings.Contains(status.Convert(err).Message(), "user name is empty") {
		return notAllowed(at, err)
	}
	return fmt.Errorf("%s: %w", at, err)
}

// firstLine returns the first line of an answer, which may quote a whole page.
func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

func notAllowed(at string, err error) error {
	return errorkind.Permanent(fmt.Errorf("%s does not let this server in: %w; kedge needs all rights below /registry/ and /kedge/, as the user whose name is the common name of --%s", at, err, settingCert))
}
