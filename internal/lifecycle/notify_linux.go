package lifecycle

import (
	"fmt"
	"net"
	"os"
	"strings"
)

// Notifier tells the service manager (systemd, or whatever speaks sd_notify(3))
// about the state of the process. Its zero value tells nobody.
type Notifier struct{ socket string }

// TakeNotifier reads NOTIFY_SOCKET and removes it from the environment, so that
// no embedded component can announce readiness before all of kedge is ready and
// no container inherits the socket. Call it once, first thing.
func TakeNotifier() Notifier {
	n := Notifier{socket: os.Getenv("NOTIFY_SOCKET")}
	os.Unsetenv("NOTIFY_SOCKET")
	return n
}

// Ready says that start-up is complete.
func (n Notifier) Ready() error { return n.send("READY=1") }

// Stopping says that an orderly stop has begun.
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
