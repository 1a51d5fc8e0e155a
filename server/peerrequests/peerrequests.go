// Package peerrequests is how the servers of a cluster ask each other for what is theirs alone, such as keys: with requests on
// the API's port, which only a certificate for links between the servers' datastores opens. No user of the API and no agent can
// have one.
//
// It knows nothing of what is asked. The packages server and assembly, and those below server, may import it.
package peerrequests

import (
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

	"kedge/internal/joining"
)

// Prefix is the beginning of the paths of these requests.
const Prefix = "/kedge-servers/"

// MaxBody is the maximum length of what is asked and answered, in bytes.
const MaxBody = 64 << 10

// nameHeader is in each answer: an older kedge does not answer, but its API server refuses the request.
const nameHeader = "Kedge-Server"

// ErrOlder is the error for a server that does not know the request.
var ErrOlder = errors.New("its kedge is older and does not know this request; upgrade it")

// Address is where a server's API can be reached.
type Address struct {
	Name string `json:"name"`
	API  string `json:"api"` // ADDRESS:PORT
}

// Addresses returns the addresses of servers, sorted. apis is ADDRESS:PORT by name.
func Addresses(apis map[string]string) (out []Address) {
	for name, api := range apis {
		out = append(out, Address{name, api})
	}
	slices.SortFunc(out, func(a, b Address) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// Handler answers the other servers with mux, whose patterns begin with [Prefix], and passes all other requests on. name is that
// of this server, peers is the authority of the links between the servers, and members returns the names of the servers.
func Handler(name string, peers *x509.Certificate, members func(context.Context) ([]string, error), mux *http.ServeMux, next http.Handler) http.Handler {
	roots := x509.NewCertPool()
	roots.AddCert(peers)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, Prefix) {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Cache-Control", "no-store")
		if err := isServer(r, roots, members); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		w.Header().Set(nameHeader, name)
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
	if slices.Contains(c.Subject.Organization, joining.WitnessGroup) {
		return fmt.Errorf("%s is a witness, and only servers of the cluster are answered here", c.Subject.CommonName)
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

// Reply answers with a value in JSON, or with an error.
func Reply(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the other server is gone
}

// Body reads what was asked.
func Body(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	return io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
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

// Ask sends a request to a server and calls read with a good answer.
func (c *Client) Ask(ctx context.Context, limit time.Duration, method string, to Address, path string, body io.Reader, read func(io.Reader) error) error {
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
	answer := io.LimitReader(resp.Body, MaxBody)
	name := resp.Header.Get(nameHeader)
	switch {
	case name == "" && resp.StatusCode != http.StatusForbidden || resp.StatusCode == http.StatusNotFound:
		return ErrOlder
	case resp.StatusCode != http.StatusOK:
		text, err := io.ReadAll(answer)
		if err != nil {
			return err
		}
		return errors.New(strings.TrimSpace(string(text)))
	case name != to.Name:
		return fmt.Errorf("at %s answers the server %q", to.API, name)
	}
	return read(answer)
}
