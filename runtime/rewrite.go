package runtime

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// rewriter serves the endpoints of mirrors with rewrites. containerd has no such setting (k3s patches
// containerd for it), so hosts.toml refers to this server, which forwards requests to the endpoint under the
// rewritten name, with the endpoint's TLS settings and credentials.
//
// It listens on the loopback address, and only if a mirror has rewrites. Every path begins with a secret that
// is new at each start and is written only to hosts.toml, which only root can read: otherwise every process of
// the machine could pull with the node's credentials.
type rewriter struct {
	registries Registries
	log        *slog.Logger

	listener net.Listener // nil if no mirror has rewrites
	server   *http.Server
	secret   string

	mu        sync.Mutex
	endpoints []*rewrittenEndpoint // guarded by mu; the index is part of the path
}

type rewrittenEndpoint struct {
	endpoint
	rules      []rewriteRule
	client     *http.Client
	authorizer docker.Authorizer
}

type rewriteRule struct {
	pattern     *regexp.Regexp
	replacement string
}

func startRewriter(r Registries, log *slog.Logger) (*rewriter, error) {
	w := &rewriter{registries: r, log: log}
	needed := false
	for _, m := range r.Mirrors {
		needed = needed || len(m.Rewrites) > 0 && len(m.Endpoints) > 0
	}
	if !needed {
		return w, nil
	}
	var key [16]byte
	rand.Read(key[:]) // never fails
	w.secret = hex.EncodeToString(key[:])
	var err error
	if w.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	w.server = &http.Server{
		Handler:           http.HandlerFunc(w.serve),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	go w.server.Serve(w.listener)
	return w, nil
}

func (w *rewriter) close() {
	if w.server != nil {
		w.server.Close()
	}
}

// address registers one endpoint of a mirror and returns the URL at which it is served.
func (w *rewriter) address(mirror, text string) string {
	e, err := parseEndpoint(text)
	if err != nil || w.listener == nil {
		return ""
	}
	config := w.registries.configFor(e.Host)
	re := &rewrittenEndpoint{endpoint: e}
	rewrites := w.registries.Mirrors[mirror].Rewrites
	for _, pattern := range sortedKeys(rewrites) {
		re.rules = append(re.rules, rewriteRule{regexp.MustCompile(pattern), rewrites[pattern]})
	}
	transport := docker.DefaultHTTPTransport(&tls.Config{})
	if err := config.TLS.apply(transport.TLSClientConfig); err != nil {
		// The file may exist at the next start; until then pulls report the error.
		w.log.Warn("the TLS settings of a registry endpoint cannot be used", "endpoint", e.String(), keyError, err)
	}
	re.client = &http.Client{Transport: transport}
	re.authorizer = docker.NewDockerAuthorizer(
		docker.WithAuthClient(re.client),
		docker.WithAuthCreds(func(host string) (string, string, error) {
			return w.registries.configFor(host).Auth.credentials()
		}),
	)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.endpoints = append(w.endpoints, re)
	return fmt.Sprintf("http://%s/%s/%d", w.listener.Addr(), w.secret, len(w.endpoints)-1)
}

// serve answers /SECRET/INDEX/REPOSITORY/KIND/REFERENCE.
func (w *rewriter) serve(rw http.ResponseWriter, req *http.Request) {
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		http.Error(rw, "mirrors are read-only", http.StatusMethodNotAllowed)
		return
	}
	parts := strings.SplitN(strings.TrimPrefix(req.URL.Path, "/"), "/", 3)
	if len(parts) != 3 || parts[0] != w.secret {
		http.NotFound(rw, req)
		return
	}
	w.mu.Lock()
	index, err := strconv.Atoi(parts[1])
	if err != nil || index < 0 || index >= len(w.endpoints) {
		w.mu.Unlock()
		http.NotFound(rw, req)
		return
	}
	e := w.endpoints[index]
	w.mu.Unlock()

	repository, rest, ok := splitRepository(parts[2])
	if !ok {
		http.NotFound(rw, req)
		return
	}
	renamed := e.rename(repository)
	w.log.Debug("rewrote repository", "from", repository, "to", renamed, "endpoint", e.Host)
	resp, err := e.forward(req, renamed, rest)
	if err != nil {
		http.Error(rw, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	for k, v := range resp.Header {
		rw.Header()[k] = v
	}
	rw.WriteHeader(resp.StatusCode)
	// A client detects the short body and resumes.
	_, _ = io.Copy(rw, resp.Body)
}

// splitRepository splits "library/busybox/manifests/latest" before "/manifests".
func splitRepository(path string) (repository, rest string, ok bool) {
	for _, kind := range []string{"/manifests/", "/blobs/", "/referrers/", "/tags/"} {
		if i := strings.LastIndex(path, kind); i > 0 {
			return path[:i], path[i:], true
		}
	}
	return "", "", false
}

// rename applies the first rule that changes the name. Rules are sorted by their patterns, so that the order is
// the same at every start.
func (e *rewrittenEndpoint) rename(repository string) string {
	for _, r := range e.rules {
		if to := r.pattern.ReplaceAllString(repository, r.replacement); to != repository {
			return to
		}
	}
	return repository
}

// forward sends a request to the endpoint. If the request has no credentials (pull secrets of a pod) and the
// endpoint requires some, the endpoint's own credentials are used.
func (e *rewrittenEndpoint) forward(in *http.Request, repository, rest string) (*http.Response, error) {
	ctx := docker.ContextWithAppendPullRepositoryScope(in.Context(), repository)
	target := *e.URL
	target.Path += "/" + repository + rest
	target.RawQuery = in.URL.RawQuery
	for attempt := 0; ; attempt++ {
		out, err := http.NewRequestWithContext(ctx, in.Method, target.String(), nil)
		if err != nil {
			return nil, err
		}
		for _, k := range []string{"Accept", "Range", "User-Agent", "Authorization"} {
			if v := in.Header.Values(k); len(v) > 0 {
				out.Header[k] = v
			}
		}
		own := out.Header.Get("Authorization") == ""
		if own {
			if err := e.authorizer.Authorize(ctx, out); err != nil {
				return nil, err
			}
		}
		resp, err := e.client.Do(out)
		if err != nil || !own || resp.StatusCode != http.StatusUnauthorized || attempt > 0 {
			return resp, err
		}
		if err := e.authorizer.AddResponses(ctx, []*http.Response{resp}); err != nil {
			return resp, nil // the client may be able to handle the 401
		}
		resp.Body.Close()
	}
}

// credentials returns a user name and a secret; for a token the name is empty.
func (a *RegistryAuth) credentials() (string, string, error) {
	switch {
	case a == nil:
		return "", "", nil
	case a.Username != "":
		return a.Username, string(a.Password), nil
	case a.IdentityToken != "":
		return "", string(a.IdentityToken), nil
	case a.Auth != "":
		text, err := base64.StdEncoding.DecodeString(string(a.Auth))
		if err != nil {
			return "", "", errors.New("auth is not valid base64")
		}
		name, password, ok := strings.Cut(string(text), ":")
		if !ok {
			return "", "", errors.New("auth is not name:password in base64")
		}
		return name, strings.TrimRight(password, "\x00"), nil
	}
	return "", "", nil
}

func (t *RegistryTLS) apply(config *tls.Config) error {
	if t == nil {
		return nil
	}
	config.InsecureSkipVerify = t.InsecureSkipVerify
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return err
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s contains no certificate", t.CAFile)
		}
		config.RootCAs = pool
	}
	if t.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
		if err != nil {
			return err
		}
		config.Certificates = []tls.Certificate{cert}
	}
	return nil
}
