package keeper

import (
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

// Request is what a keeper is asked, one a connection.
type Request struct {
	Op     string   `json:"op"` // start, signal, state or wait
	Args   []string `json:"args,omitempty"`
	Env    []string `json:"env,omitempty"`
	Signal int      `json:"signal,omitempty"`
}

// State is the answer: how kedge does.
type State struct {
	Error   string    `json:"error,omitempty"`
	Running bool      `json:"running"`
	PID     int       `json:"pid,omitempty"` // inside the machine
	Started time.Time `json:"started,omitzero"`
	// Ended says how the last run ended, in words; empty before.
	Ended string `json:"ended,omitempty"`
}

// keeper is the machine's first process.
type keeper struct {
	socket *net.UnixListener

	mu      sync.Mutex
	state   State
	changed chan struct{} // closed and replaced when state changes
}

func listen() (*keeper, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: Socket, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return &keeper{socket: l, changed: make(chan struct{})}, os.Chmod(Socket, 0o600)
}

// run answers and buries until the process is killed, or until the tool that the
// machine is tethered to has ended. The kernel then ends the rest of the machine.
func (k *keeper) run() error {
	children := make(chan os.Signal, 1)
	signal.Notify(children, unix.SIGCHLD)
	// A machine ends when it is switched off, not by a signal from within. Signals that
	// are ignored would be so by kedge too.
	signal.Notify(make(chan os.Signal, 1), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	go func() {
		for range children {
			k.bury()
		}
	}()
	for {
		conn, err := k.socket.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go k.answer(conn)
	}
}

// bury takes note of every process that has ended: kedge, and all whose parents
// have ended before them.
func (k *keeper) bury() {
	k.mu.Lock() // not between the start of kedge and the note of its number
	defer k.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid == 0 {
			return
		}
		if !k.state.Running || pid != k.state.PID {
			continue
		}
		k.state = State{Ended: fmt.Sprintf("exit code %d", status.ExitStatus())}
		if status.Signaled() {
			k.state.Ended = "signal: " + status.Signal().String()
		}
		close(k.changed)
		k.changed = make(chan struct{})
	}
}

func (k *keeper) answer(conn net.Conn) {
	defer conn.Close()
	var r Request
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return
	}
	st, err := k.obey(r)
	if err != nil {
		st.Error = err.Error()
	}
	_ = json.NewEncoder(conn).Encode(st)
}

func (k *keeper) obey(r Request) (State, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch r.Op {
	case "start":
		if k.state.Running {
			return k.state, errors.New("kedge runs already on this machine")
		}
		pid, err := start(r)
		if err != nil {
			return k.state, err
		}
		k.state = State{Running: true, PID: pid, Started: time.Now()}
	case "signal":
		if !k.state.Running {
			return k.state, errors.New("kedge does not run on this machine")
		}
		return k.state, unix.Kill(k.state.PID, unix.Signal(r.Signal))
	case "wait":
		for k.state.Running {
			changed := k.changed
			k.mu.Unlock()
			<-changed
			k.mu.Lock()
		}
	case "state":
	default:
		return k.state, fmt.Errorf("a keeper does not know how to %q", r.Op)
	}
	return k.state, nil
}

// start runs kedge with what it writes added to its log.
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
