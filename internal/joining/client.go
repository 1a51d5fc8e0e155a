package joining

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"kedge/internal/pki"
	"kedge/internal/token"
)

// ErrWrongCA is wrapped when a server shows an authority that the token does not
// name. Nothing was sent to it.
var ErrWrongCA = errors.New("the server is not of the cluster that the token is for")

// Refused is a server's answer that asking again will not change.
type Refused struct {
	Status  int    // of HTTP
	Message string // the server's
}

// Error implements error.
func (r *Refused) Error() string { return r.Message }

// answerWithin is how long a server may take for one answer, and connectWithin to take
// the connection: where it was before it moved, nobody may answer at all.
const (
	answerWithin  = 15 * time.Second
	connectWithin = 3 * time.Second
)

// Proof shows that whoever made it knows the secret, and binds it to one authority.
// It can be tried against guesses, which is why a secret must not be short.
func Proof(secret token.Secret, authority *x509.Certificate) string {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("kedge authority\x00"))
	m.Write(authority.Raw)
	return hex.EncodeToString(m.Sum(nil))
}

// FetchCA asks the server at base, a URL, for its authority and returns it if the
// token names it. What the server's certificate says is not looked at: the
// authority is believed for its hash alone.
func FetchCA(ctx context.Context, base string, t token.Token) (*x509.Certificate, error) {
	var got CA
	// The one request that trusts nobody, carries nothing and believes nothing.
	anyone := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
	if _, err := ask(ctx, anyone, http.MethodGet, base, PathCA, nil, &got); err != nil {
		return nil, fmt.Errorf("ask %s for the cluster's authority: %w", base, err)
	}
	ca, err := pki.ParseCertificate("the answer of "+base, []byte(got.Certificate))
	if err != nil {
		return nil, err
	}
	if t.CAHash == "" {
		want := []byte(Proof(t.Secret, ca))
		if !slices.ContainsFunc(got.Proofs, func(p string) bool { return hmac.Equal(want, []byte(p)) }) {
			return nil, fmt.Errorf("%w: %s does not know the secret of --token; give both the same, or use a token that \"kedge token create\" has made", ErrWrongCA, base)
		}
		return ca, nil
	}
	if subtle.ConstantTimeCompare([]byte(pki.Hash(ca)), []byte(t.CAHash)) != 1 {
		return nil, fmt.Errorf("%w: %s has the authority %s, and the token names %s; check --server, and that nobody answers in its place", ErrWrongCA, base, pki.Hash(ca), t.CAHash)
	}
	return ca, nil
}

// Join asks to be let in under a name, and returns the answer and the address that
// this machine has towards the server.
func Join(ctx context.Context, base string, ca *x509.Certificate, r Request) (Answer, netip.Addr, error) {
	var a Answer
	local, err := ask(ctx, trusting(ca), http.MethodPost, base, PathJoin, r, &a)
	return a, local, err
}

// JoinServer asks to be let in as a server, and opens what was sealed for key.
func JoinServer(ctx context.Context, base string, ca *x509.Certificate, key *ecdsa.PrivateKey, r ServerRequest) (ServerAnswer, Credentials, error) {
	var a ServerAnswer
	if _, err := ask(ctx, trusting(ca), http.MethodPost, base, PathServer, r, &a); err != nil {
		return a, nil, err
	}
	opened, err := pki.Open(key, SealPurpose, a.Sealed)
	if err != nil {
		return a, nil, fmt.Errorf("open the credentials from %s: %w", base, err)
	}
	var c Credentials
	if err := json.Unmarshal(opened, &c); err != nil {
		return a, nil, fmt.Errorf("read the credentials from %s: %w", base, err)
	}
	return a, c, nil
}

// Renew asks for new certificates with the key of the old one, which may have
// expired.
func Renew(ctx context.Context, base string, ca *x509.Certificate, old tls.Certificate) (Answer, netip.Addr, error) {
	var a Answer
	c := trusting(ca)
	// Not Certificates: of those Go sends none that the server's list of
	// authorities does not name, and the key is what counts.
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &old, nil }
	local, err := ask(ctx, c, http.MethodPost, base, PathRenew, struct{}{}, &a)
	return a, local, err
}

func trusting(ca *x509.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
}

// ask makes one request on a connection of its own.
func ask(ctx context.Context, c *tls.Config, method, base, path string, body, into any) (local netip.Addr, err error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		if a, ok := i.Conn.LocalAddr().(*net.TCPAddr); ok {
			local = a.AddrPort().Addr().Unmap()
		}
	}})
	var content io.Reader = http.NoBody
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return local, err
		}
		content = bytes.NewReader(data)
	}
	u, err := url.JoinPath(base, path)
	if err != nil {
		return local, err
	}
	req, err := http.NewRequestWithContext(ctx, method, u, content)
	if err != nil {
		return local, err
	}
	req.Header.Set("Content-Type", "application/json")
	// No proxy: what the environment names is for the internet.
	dialer := &net.Dialer{Timeout: connectWithin}
	transport := &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true, DialContext: dialer.DialContext}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		return local, explainTLS(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, MaxBody))
	if err != nil {
		return local, fmt.Errorf("read the answer of %s: %w", base, err)
	}
	if resp.StatusCode != http.StatusOK {
		return local, refusal(base, resp.StatusCode, data)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return local, fmt.Errorf("read the answer of %s: %w", base, err)
	}
	return local, nil
}

// refusal makes an error of an answer without success: Refused when the request
// itself was the reason, and one that is worth a second try otherwise.
func refusal(base string, status int, body []byte) error {
	var p Problem
	if json.Unmarshal(body, &p) != nil || p.Error == "" {
		p.Error = fmt.Sprintf("%s answers %d %s, which no kedge server does; check --server", base, status, http.StatusText(status))
	}
	if status >= 400 && status < 500 && status != http.StatusTooManyRequests {
		return &Refused{Status: status, Message: p.Error}
	}
	return errors.New(p.Error)
}

// explainTLS adds what to do about a certificate that does not fit.
func explainTLS(err error) error {
	var name x509.HostnameError
	if errors.As(err, &name) {
		return &Refused{Message: fmt.Sprintf("the server's certificate does not name %s; use an address that it names, or start the server with --tls-san=%s", name.Host, name.Host)}
	}
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		return fmt.Errorf("%w: its certificate is of another authority", ErrWrongCA)
	}
	return err
}
