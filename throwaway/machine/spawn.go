package machine

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"kedge/internal/namespaces"
)

// tether is the connection of this process to a supervisor. A tethered supervisor exits when
// it is closed.
type tether struct {
	orders *os.File
	cmd    *exec.Cmd
	ended  chan struct{} // closed when the supervisor has ended
}

// close closes the connection. A nil tether is a no-op.
func (t *tether) close() error {
	if t == nil {
		return nil
	}
	return t.orders.Close()
}

// spawn starts a supervisor with a specification and waits until it is ready. flags are the
// namespaces that are made for it; in is its network namespace, nil for this process's own.
func (s *Site) spawn(name string, spec any, in *namespaces.Network, flags uintptr, more []*os.File) (_ *tether, err error) {
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	ordersIn, orders, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ordersIn.Close()
	ready, readyOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, orders.Close())
	}
	defer ready.Close()
	cmd := &exec.Cmd{
		Path: s.record.Supervisor, Args: []string{name}, Dir: "/",
		// A site has many supervisors, and each of them should need little memory.
		Env:         []string{"GOGC=50", "GOMAXPROCS=2", "PATH=" + searchPath},
		ExtraFiles:  append([]*os.File{ordersIn, readyOut}, more...),
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: flags, Setsid: true},
	}
	start := cmd.Start
	if in != nil {
		start = func() error { return in.Do(cmd.Start) }
	}
	err = start()
	readyOut.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start a supervisor: %w", explain(err)), orders.Close())
	}
	t := &tether{orders: orders, cmd: cmd, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(t.ended)
	}()
	// One write each: less than a pipe holds.
	if _, err = orders.Write(append(data, '\n')); err == nil {
		var answer []byte
		if answer, err = io.ReadAll(ready); err == nil && string(answer) != "ready" {
			err = errors.New(string(answer))
			if len(answer) == 0 {
				err = errors.New("it ended without a message")
			}
		}
	}
	if err == nil {
		_, err = orders.Write([]byte("!"))
	}
	if err != nil {
		_ = cmd.Process.Kill()
		<-t.ended
		return nil, errors.Join(fmt.Errorf("start a supervisor: %w", err), orders.Close())
	}
	return t, nil
}

// explain adds the remedy to an error of starting a process in new namespaces.
func explain(err error) error {
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("cannot create namespaces: %w; root lacks CAP_SYS_ADMIN, or a seccomp filter forbids it: start the container with --privileged", err)
	}
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("cannot create more namespaces: %w; raise the parameters user.max_*_namespaces", err)
	}
	return err
}
