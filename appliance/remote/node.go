package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/internal/atomicfile"
	"kedge/launcher/bootguard"
)

// Node answers the servers on a node. It costs nothing until a server connects.
type Node struct {
	Name            string
	Version         string // of the running kedge
	Launcher        string // the executable that was started, for a node without installation
	DataDir, RunDir string
	// Flags are for commands of kedge about this node: the directories and the configuration file.
	Flags []string
	// Restart ends this process. It is called on machines without a service manager, where whatever has started kedge
	// starts it again.
	Restart func()
	Log     *slog.Logger

	mu     sync.Mutex // held while an upgrade begins
	hashed hashedFile // guarded by mu
}

// Installed is the kedge that is installed on a node.
type Installed struct {
	Node    string `json:"node"`
	Version string `json:"version"` // that runs
	Arch    string `json:"arch"`    // as Go names it
	Path    string `json:"path"`
	Hash    string `json:"hash"` // of the executable
}

// Begin has the settings of an upgrade.
type Begin struct {
	Observe time.Duration `json:"observe"`
	Wait    time.Duration `json:"wait"`
}

// hashedFile is the hash of a file that has not changed since.
type hashedFile struct {
	path string
	time time.Time
	size int64
	hash string
}

// incoming is the folder of files of a release that a server has sent, below that of upgrades.
const incoming = "incoming"

// Limits of what a server sends.
const (
	maxFile      = 1 << 30 // bytes
	maxBegin     = 1 << 10 // bytes
	beginTimeout = 10 * time.Minute
)

// Conn returns a connection to the node's answers. They end when it is closed.
func (n *Node) Conn() net.Conn {
	ours, theirs := net.Pipe()
	l := &oneConn{conn: theirs, closed: make(chan struct{})}
	srv := &http.Server{Handler: n.handler(), ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed || state == http.StateHijacked {
			l.Close()
		}
	}}
	go func() { _ = srv.Serve(l) }() // its error is that of the closed listener
	return ours
}

// oneConn is a listener with one connection.
type oneConn struct {
	conn   net.Conn
	given  sync.Once
	closed chan struct{}
	once   sync.Once
}

func (l *oneConn) Accept() (conn net.Conn, err error) {
	l.given.Do(func() { conn = l.conn })
	if conn != nil {
		return conn, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

func (n *Node) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/installed", n.answer(func(*http.Request) (any, error) { return n.installed() }))
	mux.HandleFunc("GET /v1/upgrades", n.answer(func(*http.Request) (any, error) {
		return appliance.Machine{Root: "/"}.Upgrades(n.DataDir)
	}))
	mux.HandleFunc("GET /v1/support-bundle", n.sendSupport)
	mux.HandleFunc("PUT /v1/files/{name}", n.answer(func(r *http.Request) (any, error) { return struct{}{}, n.receive(r.PathValue("name"), r.Body) }))
	mux.HandleFunc("POST /v1/upgrade", n.answer(func(r *http.Request) (any, error) {
		var b Begin
		if err := json.NewDecoder(io.LimitReader(r.Body, maxBegin)).Decode(&b); err != nil {
			return nil, err
		}
		return struct{}{}, n.begin(r.Context(), b)
	}))
	return mux
}

// answer sends a result as JSON, and an error as text.
func (n *Node) answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v) // the server is gone
	}
}

// installed returns the executable that the service starts.
func (n *Node) installed() (Installed, error) {
	path, err := appliance.Machine{Root: "/"}.Program(n.DataDir)
	if errors.Is(err, appliance.ErrNoJournal) {
		path, err = n.Launcher, nil
	}
	if err == nil && path == "" {
		err = errors.New("the executable of this node is not known: it was started without its launcher")
	}
	if err != nil {
		return Installed{}, err
	}
	hash, err := n.hash(path)
	return Installed{Node: n.Name, Version: n.Version, Arch: runtime.GOARCH, Path: path, Hash: hash}, err
}

// hash returns the hash of a file, which is read only if it has changed.
func (n *Node) hash(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	now := hashedFile{path: path, time: st.ModTime(), size: st.Size(), hash: n.hashed.hash}
	if now != n.hashed {
		if now.hash, err = appliance.HashFile(path); err != nil {
			return "", err
		}
		n.hashed = now
	}
	return now.hash, nil
}

// receive stores a file of a release.
func (n *Node) receive(name string, body io.Reader) (err error) {
	names := []string{release.ListName, release.SignatureName, release.VersionName, release.Executable(runtime.GOARCH)}
	if !slices.Contains(names, name) {
		return fmt.Errorf("%q is no file for an upgrade of this node", name)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	dir := bootguard.Path(n.DataDir, incoming)
	if err := errors.Join(atomicfile.MkdirAll(filepath.Dir(dir), 0o700), atomicfile.MkdirAll(dir, 0o700)); err != nil {
		return err
	}
	path := filepath.Join(dir, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o700)
	if err != nil {
		return err
	}
	size, err := io.Copy(f, io.LimitReader(body, maxFile+1))
	if err == nil && size > maxFile {
		err = fmt.Errorf("%s has more than %d MiB", name, maxFile>>20)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// begin begins an upgrade to the executable that was received. It goes on when this process ends.
func (n *Node) begin(ctx context.Context, b Begin) error {
	here, err := n.installed()
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	dir := bootguard.Path(n.DataDir, incoming)
	defer os.RemoveAll(dir) // the upgrade has a copy
	ctx, cancel := context.WithTimeout(ctx, beginTimeout)
	defer cancel()
	args := append([]string{"upgrade", "--file=" + filepath.Join(dir, release.Executable(runtime.GOARCH)), "--no-wait",
		"--observe=" + b.Observe.String(), "--wait=" + b.Wait.String()}, n.Flags...)
	cmd := exec.CommandContext(ctx, here.Path, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		n.Log.Warn("an upgrade that a server has asked for was refused", "output", string(out))
		return errors.New(lastLine(string(out), err))
	}
	n.Log.Info("a server has begun an upgrade of this node", "output", strings.TrimSpace(string(out)))
	if appliance.FindManager().Name() == "" {
		time.AfterFunc(time.Second, n.Restart) // after the answer
	}
	return nil
}

// supportTimeout is the time limit for collecting the state of the node.
const supportTimeout = 5 * time.Minute

// sendSupport collects the state of the node in a file, and sends it.
func (n *Node) sendSupport(w http.ResponseWriter, r *http.Request) {
	f, err := n.collect(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil {
		w.Header().Set("Content-Length", strconv.FormatInt(st.Size(), 10)) // so that the other end notices a part
	}
	w.Header().Set("Content-Type", "application/zstd")
	_, _ = io.Copy(w, f) // the server is gone
}

// collect returns the open file with the state of the node, which has no name any more.
func (n *Node) collect(ctx context.Context) (*os.File, error) {
	here, err := n.installed()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(n.DataDir, ".tmp-support-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "state.tar.zst")
	ctx, cancel := context.WithTimeout(ctx, supportTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, here.Path, append([]string{"support-bundle", "--output=" + path}, n.Flags...)...)
	cmd.WaitDelay = time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, errors.New(lastLine(string(out), err))
	}
	return os.Open(path)
}

// lastLine returns what a command has said last, without its name.
func lastLine(out string, err error) string {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if last := strings.TrimPrefix(lines[len(lines)-1], "kedge: "); last != "" {
		return last
	}
	return err.Error()
}
