// Package control is how other kedge commands ask the running process: HTTP on
// a unix socket that only root can open.
//
// It is not an API for users or other machines. Only package main imports it.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/pprof"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kedge/internal/lifecycle"
)

// ErrNotRunning is wrapped when no kedge answers on the socket.
var ErrNotRunning = errors.New("kedge is not running")

// Report is what the process says of itself.
type Report struct {
	Version    string             `json:"version"`
	Node       string             `json:"node"`
	PID        int                `json:"pid"`
	Started    time.Time          `json:"started"`
	Memory     Memory             `json:"memory"`
	Components []lifecycle.Status `json:"components"`
}

// Memory is the process's resident memory in bytes.
type Memory struct {
	Resident  int64 `json:"resident"`
	Anonymous int64 `json:"anonymous"` // the part that is not pages of files
}

// Socket is the path of the socket in a run directory.
func Socket(runDir string) string { return filepath.Join(runDir, "kedge.sock") }

// Server is the component that answers. It comes after nothing, so that it can
// tell what the others wait for.
type Server struct {
	socket string
	report func(context.Context) Report
	mux    *http.ServeMux
}

// NewServer makes a server; report is called for each question.
func NewServer(runDir string, report func(context.Context) Report) *Server {
	return &Server{socket: Socket(runDir), report: report, mux: http.NewServeMux()}
}

// Answer makes the server answer questions at path, whose parameters are those of
// a URL. The answer is sent as JSON, an error as one line of text. It must be
// called before Run.
func (s *Server) Answer(path string, answer func(context.Context, url.Values) (any, error)) {
	s.handle(http.MethodGet, path, answer)
}

// Obey makes the server do something when it is told to at path, and is otherwise
// as Answer.
func (s *Server) Obey(path string, do func(context.Context, url.Values) (any, error)) {
	s.handle(http.MethodPost, path, do)
}

// Otherwise makes the server answer all other questions with an error. It must be called
// before Run.
func (s *Server) Otherwise(why func() error) {
	s.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, why().Error(), http.StatusServiceUnavailable)
	})
}

func (s *Server) handle(method, path string, answer func(context.Context, url.Values) (any, error)) {
	s.mux.HandleFunc(method+" "+path, func(w http.ResponseWriter, r *http.Request) {
		v, err := answer(r.Context(), r.URL.Query())
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(v)
	})
}

// Name implements lifecycle.Component.
func (s *Server) Name() string { return "control" }

// Run implements lifecycle.Component.
func (s *Server) Run(ctx context.Context, ready func()) error {
	// A crash leaves the socket behind. The run directory's lock says that no
	// other kedge is alive to whom it could belong.
	if err := os.Remove(s.socket); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove an old socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", s.socket)
	if err != nil {
		return fmt.Errorf("listen for kedge's own commands: %w", err)
	}
	if err := os.Chmod(s.socket, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("restrict the control socket: %w", err)
	}
	mux := s.mux
	s.Answer("/status", func(ctx context.Context, _ url.Values) (any, error) { return s.report(ctx), nil })
	// Profiles of the running process, for whoever may open the socket:
	// curl --unix-socket /run/kedge/kedge.sock http://kedge/debug/pprof/heap
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	ready()
	select {
	case err := <-done:
		return fmt.Errorf("serve kedge's own commands: %w", err)
	case <-ctx.Done():
		srv.Close()
		<-done
		return nil
	}
}

// Ask returns the report of the process that runs with runDir.
func Ask(ctx context.Context, runDir string) (Report, error) {
	var r Report
	err := Get(ctx, runDir, "/status", nil, &r)
	return r, err
}

// Get asks the process that runs with runDir what it answers at path, and decodes
// the answer into v.
func Get(ctx context.Context, runDir, path string, parameters url.Values, v any) error {
	return ask(ctx, http.MethodGet, runDir, path, parameters, v)
}

// Tell has the process that runs with runDir do what it does when it is told to at
// path, and decodes its answer into v.
func Tell(ctx context.Context, runDir, path string, parameters url.Values, v any) error {
	return ask(ctx, http.MethodPost, runDir, path, parameters, v)
}

func ask(ctx context.Context, method, runDir, path string, parameters url.Values, v any) error {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", Socket(runDir))
		},
	}}
	defer client.CloseIdleConnections()
	u := url.URL{Scheme: "http", Host: "kedge", Path: path, RawQuery: parameters.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w with run directory %s; start it with \"kedge server\", or name another with --run-dir", ErrNotRunning, runDir)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: ask as root", err)
	case err != nil:
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		return errors.New(strings.TrimSpace(string(text)))
	}
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		return fmt.Errorf("read kedge's answer: %w", err)
	}
	return nil
}
