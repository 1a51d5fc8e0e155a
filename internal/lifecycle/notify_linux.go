package lifecycle

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// EndSupervision makes OpenRC's supervise-daemon stop the service of this process, if it is one: supervise-daemon would start
// it again whatever its exit code is, for ever. systemd knows which exit codes mean that (RestartPreventExitStatus).
// The supervisor marks the service as stopped. Call it right before the process exits.
//
// It returns when the supervisor answers with a SIGTERM. If the process ended before that, the supervisor could hear of its end
// before it knows that it has to stop, and would then wait for all its time limits for a process that has ended.
func EndSupervision() error {
	if os.Getenv("RC_SVCNAME") == "" {
		return nil
	}
	parent := os.Getppid()
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", parent))
	if err != nil || strings.TrimSpace(string(comm)) != supervisorComm {
		return err
	}
	answer := make(chan os.Signal, 1)
	signal.Notify(answer, unix.SIGTERM)
	defer signal.Stop(answer)
	if err := unix.Kill(parent, unix.SIGTERM); err != nil {
		return err
	}
	select {
	case <-answer:
	case <-time.After(supervisorLimit):
	}
	return nil
}

// supervisorLimit is the time limit for the answer of a supervisor. Without one the service is stopped too, only later.
const supervisorLimit = 5 * time.Second

// supervisorComm is the name of supervise-daemon in the process table, which has 15 characters for it.
const supervisorComm = "supervise-daemo"

// Notifier reports the state of the process to the service manager (systemd, or another with
// sd_notify(3)). Its zero value does nothing.
type Notifier struct{ socket string }

// TakeNotifier reads NOTIFY_SOCKET and removes it from the environment, so that
// no embedded component can announce readiness before all of kedge is ready and
// no container inherits the socket. Call it once, first thing.
func TakeNotifier() Notifier {
	n := Notifier{socket: os.Getenv("NOTIFY_SOCKET")}
	os.Unsetenv("NOTIFY_SOCKET")
	return n
}

// Ready reports that the start is complete.
func (n Notifier) Ready() error { return n.send("READY=1") }

// Stopping reports that an orderly stop has begun.
func (n Notifier) Stopping() error { return n.send("STOPPING=1") }

func (n Notifier) send(state string) error {
	if n.socket == "" {
		return nil
	}
	name := n.socket
	if strings.HasPrefix(name, "@") {
		name = "\x00" + name[1:] // abstract socket
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(state)); err != nil {
		return fmt.Errorf("notify the service manager: %w", err)
	}
	return nil
}
