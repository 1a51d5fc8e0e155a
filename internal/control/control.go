// Package control is the connection between kedge's commands and the running process: HTTP
// on a unix socket that only root can open.
//
// It is not an API for users or other machines. Packages command and assembly import it, and
// throwaway and appliance for the report of a node.
package control

import (
	"bufio"
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

	"kedge/internal/errorkind"
	"kedge/internal/fswatch"
	"kedge/internal/lifecycle"
	"kedge/internal/unixsocket"
)

// ErrNotRunning is wrapped when no kedge answers on the socket.
var ErrNotRunning = errors.New("kedge is not running")

// ErrUnknownRequest is wrapped when the running kedge does not know a request: it is an older one than the command.
var ErrUnknownRequest = errors.New("the running kedge does not know this request")

// Report describes the running process.
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

// Server is the component that answers requests of commands. It depends on no other
// component, so that it can report what the others wait for.
type Server struct {
	socket string
	report func(context.Context) Report
	mux    *http.ServeMux
}

// NewServer makes a server; report is called for each request for the report.
func NewServer(runDir string, report func(context.Context) Report) *Server {
	return &Server{socket: Socket(runDir), report: report, mux: http.NewServeMux()}
}

// HandleGet registers the handler of GET requests for path. The handler gets the URL's
// parameters. Its result is sent as JSON, and its error as one line of text, which is marked at
// the other end if it is one of the command line. HandleGet must be called before Run.
func (s *Server) HandleGet(path string, handler func(context.Context, url.Values) (any, error)) {
	s.handle(http.MethodGet, path, handler)
}

// HandlePost is HandleGet for POST requests, which change something.
func (s *Server) HandlePost(path string, handler func(context.Context, url.Values) (any, error)) {
	s.handle(http.MethodPost, path, handler)
}

// Fallback makes the server answer all other requests with the error that reason returns. It
// must be called before Run.
func (s *Server) Fallback(reason func() error) {
	s.mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, reason().Error(), http.StatusServiceUnavailable)
	})
}

func (s *Server) handle(method, path string, handler func(context.Context, url.Values) (any, error)) {
	s.mux.HandleFunc(method+" "+path, func(w http.ResponseWriter, r *http.Request) {
		v, err := handler(r.Context(), r.URL.Query())
		if err != nil {
			code := http.StatusUnprocessableEntity
			if errorkind.ExitCode(err) == errorkind.ExitUsage {
				code = http.StatusBadRequest
			}
			http.Error(w, err.Error(), code)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(v)
	})
}

// HandleConnect registers a handler that connects the requester to something else: from then on the connection is that
// one's, byte by byte. It must be called before Run.
func (s *Server) HandleConnect(path string, dial func(context.Context, url.Values) (net.Conn, error)) {
	s.mux.HandleFunc(http.MethodPost+" "+path, func(w http.ResponseWriter, r *http.Request) {
		to, err := dial(r.Context(), r.URL.Query())
		if err != nil {
			code := http.StatusUnprocessableEntity
			if errors.Is(err, errors.ErrUnsupported) {
				code = http.StatusNotImplemented
			}
			http.Error(w, err.Error(), code)
			return
		}
		defer to.Close()
		conn, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + connectProtocol + "\r\n\r\n")); err != nil {
			return
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, _ = io.Copy(to, buffered) // either end may go at any time
			to.Close()
		}()
		_, _ = io.Copy(conn, to)
		conn.Close()
		<-done
	})
}

// connectProtocol is the protocol of connections that [Connect] makes.
const connectProtocol = "kedge-connect"

// Name implements lifecycle.Component.
func (s *Server) Name() string { return "control" }

// Run implements lifecycle.Component. It makes a removed socket again: without the socket
// "kedge status" could not show what is wrong.
func (s *Server) Run(ctx context.Context, ready func()) error {
	s.HandleGet("/status", func(ctx context.Context, _ url.Values) (any, error) { return s.report(ctx), nil })
	// Profiles of the running process, for every user who may open the socket:
	// curl --unix-socket /run/kedge/kedge.sock http://kedge/debug/pprof/heap
	s.mux.HandleFunc("/debug/pprof/", pprof.Index)
	s.mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	s.mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	s.mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	for ctx.Err() == nil {
		if err := s.serve(ctx, ready); err != nil {
			return err
		}
	}
	return nil
}

// serve answers requests until ctx ends or the socket is removed.
func (s *Server) serve(ctx context.Context, ready func()) error {
	l, err := s.listen(ctx)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: s.mux, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	ready()
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	removed := make(chan string, 1)
	go func() { removed <- fswatch.Removed(watch, s.socket) }()
	select {
	case err := <-done:
		return fmt.Errorf("serve kedge's own commands: %w", err)
	case <-ctx.Done():
	case <-removed:
	}
	srv.Close()
	<-done
	return nil
}

func (s *Server) listen(ctx context.Context) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(s.socket), 0o755); err != nil {
		return nil, fmt.Errorf("listen for kedge's own commands: %w", err)
	}
	// A crash leaves the socket behind. The lock of the run directory excludes another
	// kedge that could own it.
	l, err := unixsocket.ListenPrivate(ctx, s.socket)
	if err != nil {
		return nil, fmt.Errorf("listen for kedge's own commands: %w", err)
	}
	return l, nil
}

// reportLimit is the time limit for a report. A process that is stopped or stuck has an open socket and does not answer.
const reportLimit = 10 * time.Second

// GetReport returns the report of the process that runs with runDir.
func GetReport(ctx context.Context, runDir string) (Report, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, reportLimit, fmt.Errorf("kedge does not answer within %s", reportLimit))
	defer cancel()
	var r Report
	err := Get(ctx, runDir, "/status", nil, &r)
	if errors.Is(err, context.DeadlineExceeded) {
		err = context.Cause(ctx)
	}
	return r, err
}

// Get sends a GET request for path to the process that runs with runDir, and decodes the
// response into v.
func Get(ctx context.Context, runDir, path string, parameters url.Values, v any) error {
	return send(ctx, http.MethodGet, runDir, path, parameters, v)
}

// Post sends a POST request for path to the process that runs with runDir, and decodes the
// response into v.
func Post(ctx context.Context, runDir, path string, parameters url.Values, v any) error {
	return send(ctx, http.MethodPost, runDir, path, parameters, v)
}

// GetRaw sends a GET request for path to the process that runs with runDir, and returns the response, of at most limit
// bytes. The answer is no JSON: a profile below /debug/pprof/.
func GetRaw(ctx context.Context, runDir, path string, parameters url.Values, limit int64) (data []byte, err error) {
	err = exchange(ctx, http.MethodGet, runDir, path, parameters, func(r io.Reader) error {
		data, err = io.ReadAll(io.LimitReader(r, limit))
		return err
	})
	return data, err
}

// Connect connects to what the process that runs with runDir connects to for path.
func Connect(ctx context.Context, runDir, path string, parameters url.Values) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", Socket(runDir))
	if err != nil {
		return nil, explain(err, runDir)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	u := url.URL{Path: path, RawQuery: parameters.Encode()}
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: kedge\r\nConnection: Upgrade\r\nUpgrade: %s\r\nContent-Length: 0\r\n\r\n", u.String(), connectProtocol)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	// The other end says nothing by itself, so that nothing of it is in the buffer.
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		err := refusal{strings.TrimSpace(string(text)), resp.StatusCode == http.StatusNotImplemented}
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// refusal is the error of the process for [Connect]. It is errors.ErrUnsupported if it was there.
type refusal struct {
	text        string
	unsupported bool
}

func (r refusal) Error() string { return r.text }

func (r refusal) Is(target error) bool { return r.unsupported && target == errors.ErrUnsupported }

// explain returns the error of a connection to the process that runs with runDir, with the remedy. It has no parameters of the
// request, which may be secret.
func explain(err error, runDir string) error {
	if request, ok := errors.AsType[*url.Error](err); ok {
		err = request.Err
	}
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("the kedge that runs with run directory %s ended before it answered, so whether it has done what was requested is not known: %w", runDir, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w with run directory %s; start it with \"kedge server\", or name another with --run-dir", ErrNotRunning, runDir)
	case errors.Is(err, fs.ErrPermission):
		return errorkind.Permanent(fmt.Errorf("only root can ask the kedge that runs with run directory %s; run the command as root, for example with sudo", runDir))
	}
	return err
}

func send(ctx context.Context, method, runDir, path string, parameters url.Values, v any) error {
	return exchange(ctx, method, runDir, path, parameters, func(r io.Reader) error { return json.NewDecoder(r).Decode(v) })
}

// exchange sends a request and calls read with the body of a good answer.
func exchange(ctx context.Context, method, runDir, path string, parameters url.Values, read func(io.Reader) error) error {
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
	if err != nil {
		return explain(err, runDir)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		if resp.StatusCode == http.StatusNotFound {
			return fmt.Errorf("%w: %s", ErrUnknownRequest, strings.TrimSpace(string(text)))
		}
		err := errors.New(strings.TrimSpace(string(text)))
		if resp.StatusCode == http.StatusBadRequest { // the handler has marked it so
			err = errorkind.BadUsage(err)
		}
		return err
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("read kedge's answer: %w", err)
	}
	return nil
}
