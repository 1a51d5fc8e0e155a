package machines

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"kedge/internal/netns"
)

// tether is what connects a keeper with this process. While it is open a tethered
// keeper lives.
type tether struct {
	orders *os.File
	cmd    *exec.Cmd
	ended  chan struct{} // closed when the keeper has ended
}

// close cuts it, and buries a keeper that ends of it. A nil one is none.
func (t *tether) close() error {
	if t == nil {
		return nil
	}
	return t.orders.Close()
}

// spawn starts a keeper with a specification and waits until it is ready. flags are
// the namespaces that it is the first process of; in is the network that it is in,
// nil for this process's own.
func (s *Site) spawn(name string, spec any, in *netns.NS, flags uintptr, more []*os.File) (_ *tether, err error) {
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
		Path: s.record.Keeper, Args: []string{name}, Dir: "/",
		// Memory is what a site has most of: the keeper needs next to none.
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
		return nil, errors.Join(fmt.Errorf("start a keeper: %w", refusal(err)), orders.Close())
	}
	t := &tether{orders: orders, cmd: cmd, ended: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(t.ended)
	}()
	// One write each: less than a pipe holds.
	if _, err = orders.Write(append(data, '\n')); err == nil {
		var said []byte
		if said, err = io.ReadAll(ready); err == nil && string(said) != "ready" {
			err = errors.New(string(said))
			if len(said) == 0 {
				err = errors.New("it ended without a word")
			}
		}
	}
	if err == nil {
		_, err = orders.Write([]byte("!"))
	}
	if err != nil {
		_ = cmd.Process.Kill()
		<-t.ended
		return nil, errors.Join(fmt.Errorf("start a keeper: %w", err), orders.Close())
	}
	return t, nil
}

// refusal says what it means that a process cannot be started in new namespaces.
func refusal(err error) error {
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("namespaces cannot be made: %w; root lacks CAP_SYS_ADMIN, or a filter of system calls forbids it: start the container with --privileged", err)
	}
	if errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("no more namespaces can be made: %w; raise the parameters user.max_*_namespaces", err)
	}
	return err
}
