package joining

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"golang.org/x/crypto/argon2"

	"kedge/internal/pki"
)

// ErrWrongCA is wrapped when a server shows an authority that the token does not name. Nothing
// secret was sent to it.
var ErrWrongCA = errors.New("the server is not of the cluster that the token is for")

// Refused is a refusal of a server that a retry will not change.
type Refused struct {
	Status  int    // HTTP status code
	Message string // from the server
}

// Error implements error.
func (r *Refused) Error() string { return r.Message }

// answerWithin bounds the time of a server's answer, and connectWithin that of the connection:
// at the old address of a server that has moved, nothing may answer at all.
const (
	answerWithin  = 15 * time.Second
	connectWithin = 3 * time.Second
)

// AdmitWithin bounds the time that a server takes to admit another server's store: it waits for other changes of the
// stores' membership.
const AdmitWithin = 40 * time.Second

// within is the time that the client waits for an answer. It is longer than the server may take; otherwise the server's
// work would be wasted, and undone when the client asks again.
func within(path string) time.Duration {
	if path == PathServer || path == PathWitness {
		return AdmitWithin + answerWithin
	}
	return answerWithin
}

// Proof proves that its maker knows the secret, and binds it to an authority. Guesses can be
// tested against it at the speed of SHA-256, so a server gives it for random secrets only.
func Proof(secret Secret, authority *x509.Certificate) string {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("kedge authority\x00"))
	m.Write(authority.Raw)
	return hex.EncodeToString(m.Sum(nil))
}

// Costs of [SlowProof] for each guess: the minimum of OWASP's password storage cheat sheet.
// RFC 9106 recommends more memory, which small agents do not have.
const (
	slowPasses = 2
	slowKiB    = 19 << 10
	slowPrefix = "argon2id:"
)

// SlowProof proves the same as [Proof], but each guess at the secret takes some 30 ms and
// 19 MiB (Argon2id, RFC 9106; the authority is the salt).
func SlowProof(secret Secret, authority *x509.Certificate) string {
	salt := sha256.Sum256(append([]byte("kedge authority\x00"), authority.Raw...))
	return slowPrefix + hex.EncodeToString(argon2.IDKey([]byte(secret), salt[:], slowPasses, slowKiB, 1, sha256.Size))
}

// proves reports whether one of the proofs is for the secret and the authority. Older servers
// give a Proof only.
func proves(proofs []string, secret Secret, ca *x509.Certificate) bool {
	has := func(want string) bool {
		return slices.ContainsFunc(proofs, func(p string) bool { return hmac.Equal([]byte(want), []byte(p)) })
	}
	return has(Proof(secret, ca)) || has(SlowProof(secret, ca))
}

// FetchCA requests the authority of the server at the URL base and returns it if the token
// names it. The server's certificate is not verified: the authority is trusted for its hash
// alone.
func FetchCA(ctx context.Context, base string, t Token) (*x509.Certificate, error) {
	var got CA
	// This is the only request without verification. It carries nothing, and its answer is
	// verified against the token.
	anyone := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}
	if _, err := ask(ctx, anyone, http.MethodGet, base, PathCA, nil, &got); err != nil {
		return nil, fmt.Errorf("ask %s for the cluster's authority: %w", base, err)
	}
	ca, err := pki.ParseCertificate("the answer of "+base, []byte(got.Certificate))
	if err != nil {
		return nil, err
	}
	if t.CAHash == "" {
		if !proves(got.Proofs, t.Secret, ca) {
			return nil, fmt.Errorf("%w: %s does not know the secret of --token; give both the same, or use a token that \"kedge token create\" has made", ErrWrongCA, base)
		}
		return ca, nil
	}
	if subtle.ConstantTimeCompare([]byte(pki.Hash(ca)), []byte(t.CAHash)) != 1 {
		return nil, fmt.Errorf("%w: %s has the authority %s, and the token names %s; check --server, and that no other machine answers in its place", ErrWrongCA, base, pki.Hash(ca), t.CAHash)
	}
	return ca, nil
}

// Join requests to join under a name, and returns the answer and this machine's address on the
// connection to the server.
func Join(ctx context.Context, base string, ca *x509.Certificate, r Request) (Answer, netip.Addr, error) {
	var a Answer
	local, err := ask(ctx, trusting(ca), http.MethodPost, base, PathJoin, r, &a)
	return a, local, err
}

// JoinServer requests to join as a server, and opens the credentials that were sealed for key.
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

// JoinWitness requests to join as a witness.
func JoinWitness(ctx context.Context, base string, ca *x509.Certificate, r ServerRequest) (WitnessAnswer, error) {
	var a WitnessAnswer
	_, err := ask(ctx, trusting(ca), http.MethodPost, base, PathWitness, r, &a)
	return a, explainEarlier(err, base)
}

// RenewWitness is [Renew] for a witness.
func RenewWitness(ctx context.Context, base string, ca *x509.Certificate, old tls.Certificate) (WitnessAnswer, error) {
	var a WitnessAnswer
	_, err := ask(ctx, proving(ca, old), http.MethodPost, base, PathRenewWitness, struct{}{}, &a)
	return a, explainEarlier(err, base)
}

// explainEarlier explains the answer of a server of a version without witnesses.
func explainEarlier(err error, base string) error {
	var refused *Refused
	if errors.As(err, &refused) && refused.Status == http.StatusNotFound {
		return &Refused{Status: refused.Status, Message: base + " is a server of an earlier version of kedge, which knows no witnesses; upgrade the servers first"}
	}
	return err
}

// ProveKey returns a certificate for a machine's key and name, signed by the key itself. The servers know the key, and another
// signature would add nothing. So expired or lost certificates are renewed without a token.
func ProveKey(key *ecdsa.PrivateKey, name string, now time.Time) (tls.Certificate, error) {
	t := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: NodeUser(name)},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("prove the node's key: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// Renew requests new certificates by the key of the old certificate, which may have expired.
func Renew(ctx context.Context, base string, ca *x509.Certificate, old tls.Certificate) (Answer, netip.Addr, error) {
	var a Answer
	local, err := ask(ctx, proving(ca, old), http.MethodPost, base, PathRenew, struct{}{}, &a)
	return a, local, err
}

// proving is [trusting] with a certificate of the client's key.
func proving(ca *x509.Certificate, old tls.Certificate) *tls.Config {
	c := trusting(ca)
	// Not Certificates: Go would send none whose authority is missing in the server's list,
	// and only the key counts here.
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &old, nil }
	return c
}

func trusting(ca *x509.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
}

// ask makes a request on a connection of its own.
func ask(ctx context.Context, c *tls.Config, method, base, path string, body, into any) (local netip.Addr, err error) {
	ctx, cancel := context.WithTimeout(ctx, within(path))
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
	// No proxy: the environment's is for the internet.
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

// refusal makes an error of an unsuccessful answer: Refused if the request itself was the
// reason, and otherwise an error that is worth a retry.
func refusal(base string, status int, body []byte) error {
	var p Problem
	if json.Unmarshal(body, &p) != nil || p.Error == "" {
		p.Error = fmt.Sprintf("%s answered %d %s, so it is not a kedge server; check --server", base, status, http.StatusText(status))
	}
	if status >= 400 && status < 500 && status != http.StatusTooManyRequests {
		return &Refused{Status: status, Message: p.Error}
	}
	return errors.New(p.Error)
}

// explainTLS adds the remedy to an error of the server's certificate.
func explainTLS(err error) error {
	var name x509.HostnameError
	if errors.As(err, &name) {
		return &Refused{Message: fmt.Sprintf("the server's certificate is not valid for %s; use an address that it has, or start the server with --tls-san=%s", name.Host, name.Host)}
	}
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) {
		return fmt.Errorf("%w: its certificate is of another authority", ErrWrongCA)
	}
	return err
}
