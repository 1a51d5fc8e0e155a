package main

import (
	"context"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ended preserves the exit code and the last output of a container until they were read.
//
// A container may exit while no kedge runs. When kedge starts again, containerd requests the processes of each
// container from its shim. It treats an empty list as that of a container that was never started, and deletes
// the container before the CRI plugin can read the exit code: every such container would have failed with code
// 255. containerd ignores a shim that returns an error. So Pids is refused for a container that has exited; the
// CRI plugin then reads its exit code and deletes it.
//
// A container writes its output to a named pipe. The unread rest is lost when the last process closes the pipe:
// the shim, when the container has exited. So the pipe is held open until a client has learnt of the exit and
// has had the time to open the pipe.
type ended struct {
	mu   sync.Mutex
	held map[string][]io.Closer // by container
}

// readWithin is the time that the CRI plugin has to open a pipe after it has learnt of the exit. It needs a few
// milliseconds, and then reads to the end of the pipe.
const readWithin = 500 * time.Millisecond

// UnaryServerInterceptor implements shim.TTRPCServerUnaryOptioner.
func (e *ended) UnaryServerInterceptor() ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, u ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
		var request any
		answer, err := method(ctx, func(v any) error {
			request = v
			return u(v)
		})
		if err != nil {
			return answer, err
		}
		switch r := request.(type) {
		case *task.PidsRequest:
			if pids, ok := answer.(*task.PidsResponse); ok && len(pids.Processes) == 0 {
				return nil, status.Error(codes.FailedPrecondition, "the container has exited; its exit code has not been read yet")
			}
		case *task.CreateTaskRequest:
			e.hold(r.ID, r.Stdout, r.Stderr)
		case *task.WaitRequest:
			if r.ExecID == "" && ctx.Err() == nil { // otherwise the client is gone
				e.release(r.ID)
			}
		case *task.StateRequest:
			if s, ok := answer.(*task.StateResponse); ok && r.ExecID == "" && s.Status == tasktypes.Status_STOPPED {
				time.AfterFunc(readWithin, func() { e.release(r.ID) })
			}
		case *task.DeleteRequest:
			if r.ExecID == "" {
				e.release(r.ID)
			}
		}
		return answer, nil
	}
}

// hold opens the named pipes among the files.
func (e *ended) hold(id string, files ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, name := range files {
		if st, err := os.Stat(name); err != nil || st.Mode()&os.ModeNamedPipe == 0 {
			continue
		}
		// Opening for reading and writing does not wait for another process to open the pipe.
		if f, err := os.OpenFile(name, os.O_RDWR|syscall.O_NONBLOCK, 0); err == nil {
			e.held[id] = append(e.held[id], f)
		}
	}
}

func (e *ended) release(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, f := range e.held[id] {
		f.Close()
	}
	delete(e.held, id)
}
