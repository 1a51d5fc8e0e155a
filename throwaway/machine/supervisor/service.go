package supervisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Request is a request to a supervisor. A connection carries one request.
type Request struct {
	Op     string   `json:"op"` // start, signal, state or wait
	Args   []string `json:"args,omitempty"`
	Env    []string `json:"env,omitempty"`
	Signal int      `json:"signal,omitempty"`
}

// State is the response: the state of kedge.
type State struct {
	Error   string    `json:"error,omitempty"`
	Running bool      `json:"running"`
	PID     int       `json:"pid,omitempty"` // inside the machine
	Started time.Time `json:"started,omitzero"`
	// Ended says how the last run of kedge has ended; empty if none has.
	Ended string `json:"ended,omitempty"`
}

// supervisor is the machine's first process.
type supervisor struct {
	socket *net.UnixListener

	mu      sync.Mutex
	state   State
	changed chan struct{} // closed and replaced when state changes
}

func listen() (*supervisor, error) {
	// The file gets the mode that the socket has when it is bound.
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmod error
		err := c.Control(func(fd uintptr) { chmod = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(err, chmod)
	}}
	l, err := private.Listen(context.Background(), "unix", Socket)
	if err != nil {
		return nil, err
	}
	return &supervisor{socket: l.(*net.UnixListener), changed: make(chan struct{})}, nil
}

// run answers requests and reaps processes until it is killed, or until the tool that the
// machine is tethered to has ended. The kernel then ends the rest of the machine.
func (s *supervisor) run() error {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	// A machine ends when it is switched off, not by a signal from within. The signals are
	// caught and not ignored, because kedge would inherit ignored signals.
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	go func() {
		for range children {
			s.reap()
		}
	}()
	for {
		conn, err := s.socket.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go s.answer(conn)
	}
}

// reap waits for all processes that have ended: kedge, and orphans. It records the end of
// kedge.
func (s *supervisor) reap() {
	s.mu.Lock() // not between the start of kedge and the recording of its number
	defer s.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
		if !s.state.Running || pid != s.state.PID {
			continue
		}
		s.state = State{Ended: fmt.Sprintf("exit code %d", status.ExitStatus())}
		if status.Signaled() {
			s.state.Ended = "signal: " + status.Signal().String()
		}
		close(s.changed)
		s.changed = make(chan struct{})
	}
}

func (s *supervisor) answer(conn net.Conn) {
	defer conn.Close()
	var r Request
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return
	}
	st, err := s.handle(r)
	if err != nil {
		st.Error = err.Error()
	}
	_ = json.NewEncoder(conn).Encode(st)
}

func (s *supervisor) handle(r Request) (State, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.Op {
	case "start":
		if s.state.Running {
			return s.state, errors.New("kedge is already running on this machine")
		}
		pid, err := start(r)
		if err != nil {
			return s.state, err
		}
		s.state = State{Running: true, PID: pid, Started: time.Now()}
	case "signal":
		if !s.state.Running {
			return s.state, errors.New("kedge is not running on this machine")
		}
		return s.state, unix.Kill(s.state.PID, unix.Signal(r.Signal))
	case "wait":
		for s.state.Running {
			changed := s.changed
			s.mu.Unlock()
			<-changed
			s.mu.Lock()
		}
	case "state":
	default:
		return s.state, fmt.Errorf("unknown request %q", r.Op)
	}
	return s.state, nil
}

// start starts kedge. Its output is appended to its log.
func start(r Request) (int, error) {
	if err := os.MkdirAll(filepath.Dir(LogPath), 0o755); err != nil {
		return 0, err
	}
	log, err := os.OpenFile(LogPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	pid, err := syscall.ForkExec(ProgramPath, append([]string{"kedge"}, r.Args...), &syscall.ProcAttr{
		Dir: "/", Env: r.Env, Files: []uintptr{null.Fd(), log.Fd(), log.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", ProgramPath, err)
	}
	return pid, nil
}
