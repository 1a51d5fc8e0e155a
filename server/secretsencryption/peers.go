package secretsencryption

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"
)

// What the servers ask each other, on the API's port. Only a certificate for links between the servers' datastores gives an
// answer, which no user of the API and no agent can have.
const (
	peerPrefix = "/kedge-servers/"
	statePath  = peerPrefix + "secrets-encryption"        // GET: state
	filePath   = peerPrefix + "secrets-encryption/config" // GET: the file; PUT: apply the file, answers with the state
	// nameHeader is in each answer: an older kedge does not answer, but its API server refuses the request.
	nameHeader = "Kedge-Server"
)

// Limits of what the servers ask each other.
const (
	maxFile     = 64 << 10 // bytes
	askWithin   = 3 * time.Second
	applyWithin = 15 * time.Second // an API server that lags catches up first
)

// Handler answers the other servers and passes all other requests on. peers is the authority of the links between the servers,
// and members returns the names of the servers.
func (k *Keeper) Handler(peers *x509.Certificate, members func(context.Context) ([]string, error), next http.Handler) http.Handler {
	roots := x509.NewCertPool()
	roots.AddCert(peers)
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+statePath, func(w http.ResponseWriter, _ *http.Request) { reply(w, k.state(), nil) })
	mux.HandleFunc("GET "+filePath, func(w http.ResponseWriter, _ *http.Request) {
		data, err := k.file()
		if err != nil {
			reply(w, nil, err)
			return
		}
		_, _ = w.Write(data) // the other server is gone
	})
	mux.HandleFunc("PUT "+filePath, func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), applyWithin)
		defer cancel()
		data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxFile))
		if err != nil {
			reply(w, nil, err)
			return
		}
		s, err := k.apply(ctx, data)
		reply(w, s, err)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, peerPrefix) {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		if err := isServer(r, roots, members); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		w.Header().Set(nameHeader, k.name)
		mux.ServeHTTP(w, r)
	})
}

// isServer returns nil if a request comes from a server of the cluster.
func isServer(r *http.Request, roots *x509.CertPool, members func(context.Context) ([]string, error)) error {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return errors.New("only servers of the cluster are answered here")
	}
	c := r.TLS.PeerCertificates[0]
	if _, err := c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		return errors.New("only servers of the cluster are answered here")
	}
	all, err := members(r.Context())
	if err != nil {
		return fmt.Errorf("the servers of the cluster are not known: %w", err)
	}
	if !slices.Contains(all, c.Subject.CommonName) {
		return fmt.Errorf("%s is not a server of the cluster any more", c.Subject.CommonName)
	}
	return nil
}

func reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the other server is gone
}

// Client asks other servers.
type Client struct{ tls *tls.Config }

// NewClient returns a client that knows the servers' APIs, which have the name host, by their authority, and shows them the
// certificate for links between the servers' datastores in these files. They are read for each connection, because the
// certificate is renewed.
func NewClient(authority *x509.Certificate, host, certFile, keyFile string) *Client {
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	return &Client{&tls.Config{
		RootCAs: roots, ServerName: host, MinVersion: tls.VersionTLS12,
		// Not Certificates, which are sent only if the server names their authority, and the API names that of its clients.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair(certFile, keyFile)
			return &c, err
		},
	}}
}

// File returns the content of the file of the server called name, whose API is at ADDRESS:PORT.
func (c *Client) File(ctx context.Context, name, api string) (data []byte, err error) {
	err = c.ask(ctx, askWithin, http.MethodGet, address{name, api}, filePath, nil, func(r io.Reader) error {
		data, err = io.ReadAll(r)
		return err
	})
	return data, err
}

func (c *Client) state(ctx context.Context, of address) (s state, err error) {
	return s, c.ask(ctx, askWithin, http.MethodGet, of, statePath, nil, func(r io.Reader) error { return json.NewDecoder(r).Decode(&s) })
}

func (c *Client) apply(ctx context.Context, to address, file []byte) (s state, err error) {
	return s, c.ask(ctx, applyWithin+askWithin, http.MethodPut, to, filePath, bytes.NewReader(file), func(r io.Reader) error {
		return json.NewDecoder(r).Decode(&s)
	})
}

// ask sends a request to a server and calls read with a good answer.
func (c *Client) ask(ctx context.Context, limit time.Duration, method string, to address, path string, body io.Reader, read func(io.Reader) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: c.tls, DisableKeepAlives: true}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, method, "https://"+to.API+path, body)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("it has not answered within %s", limit)
		}
		return fmt.Errorf("it does not answer: %w", errors.Unwrap(err)) // without the URL
	}
	defer resp.Body.Close()
	answer := io.LimitReader(resp.Body, maxFile)
	name := resp.Header.Get(nameHeader)
	switch {
	case resp.StatusCode != http.StatusOK:
		text, err := io.ReadAll(answer)
		if err != nil {
			return err
		}
		if name == "" && resp.StatusCode != http.StatusForbidden {
			return errors.New("its kedge cannot change the encryption while it runs; upgrade it")
		}
		return errors.New(strings.TrimSpace(string(text)))
	case name != to.Name:
		return fmt.Errorf("at %s answers the server %q", to.API, name)
	}
	return read(answer)
}
