package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// superviseSwitch holds the switch's namespace open and passes connections to published ports
// on to the machines. It stays in the host's network namespace.
func superviseSwitch() error {
	ready := os.NewFile(readyFile, "ready")
	unix.CloseOnExec(NetFile)
	sw, listeners, err := openSwitch()
	if err == nil {
		_, err = io.WriteString(ready, "ready")
	}
	if err != nil {
		fmt.Fprint(ready, err)
		return err
	}
	ready.Close()
	orders := os.NewFile(specFile, "orders")
	if _, err := io.ReadFull(orders, make([]byte, 1)); err != nil {
		return nil // the tool is gone
	}
	for i, l := range listeners {
		go publish(l, sw.Ports[i], sw.Targets)
	}
	if sw.Tethered {
		_, err := io.Copy(io.Discard, orders)
		return err
	}
	orders.Close()
	forever := make(chan os.Signal, 1)
	signal.Notify(forever, unix.SIGHUP) // the process outlives its terminal
	for range forever {
	}
	return nil
}

func openSwitch() (sw Switch, listeners []net.Listener, err error) {
	spec, err := readSpec()
	if err != nil {
		return sw, nil, err
	}
	if err := json.Unmarshal(spec, &sw); err != nil {
		return sw, nil, err
	}
	if err := join(sw.Cgroups); err != nil {
		return sw, nil, err
	}
	for i := range sw.Ports {
		f := os.NewFile(uintptr(portFiles+i), "port")
		l, err := net.FileListener(f)
		if err != nil {
			return sw, nil, err
		}
		f.Close()
		listeners = append(listeners, l)
	}
	return sw, listeners, nil
}

func publish(l net.Listener, port int, targets string) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // such as too many open files
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go pass(conn.(*net.TCPConn), port, targets)
	}
}

// pass connects a client to the first machine that answers.
func pass(from *net.TCPConn, port int, targets string) {
	defer from.Close()
	data, err := os.ReadFile(targets)
	if err != nil {
		return
	}
	for address := range strings.FieldsSeq(string(data)) {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(address, strconv.Itoa(port)), 2*time.Second)
		if err != nil {
			continue
		}
		to := conn.(*net.TCPConn)
		defer to.Close()
		var both sync.WaitGroup
		copyHalf := func(dst, src *net.TCPConn) {
			_, _ = io.Copy(dst, src)
			_ = dst.CloseWrite()
		}
		both.Go(func() { copyHalf(to, from) })
		both.Go(func() { copyHalf(from, to) })
		both.Wait()
		return
	}
}
