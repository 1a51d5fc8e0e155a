package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"kedge/internal/testhost"
)

// cluster is a machine that runs kedge, and a user's machine beside it.
type cluster struct {
	o    options
	dir  string
	lan  *testhost.LAN
	node *testhost.Host
	user *testhost.Host

	server *exec.Cmd
	ended  chan error
}

var (
	nodeAddr = netip.MustParsePrefix("192.168.97.10/24")
	userAddr = netip.MustParsePrefix("192.168.97.2/24")
)

const nodeName = "upstream-1"

func newCluster(o options) (c *cluster, err error) {
	c = &cluster{o: o, ended: make(chan error, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.close(false))
		}
	}()
	if c.dir, err = os.MkdirTemp("", "kedge-upstream-"); err != nil {
		return nil, err
	}
	if c.lan, err = testhost.NewLAN(); err != nil {
		return nil, err
	}
	if c.node, err = c.lan.Host("node", nodeAddr); err != nil {
		return nil, err
	}
	if c.user, err = c.lan.Host("user", userAddr); err != nil {
		return nil, err
	}
	if err := c.node.Route(netip.MustParsePrefix("0.0.0.0/0"), userAddr.Addr()); err != nil {
		return nil, err
	}
	kedge, err := filepath.Abs(o.kedge)
	if err != nil {
		return nil, err
	}
	if err := os.Symlink(kedge, c.kubectl()); err != nil {
		return nil, err
	}
	images := filepath.Join(c.dir, "data", "images")
	if err := os.MkdirAll(images, 0o755); err != nil {
		return nil, err
	}
	archive, err := filepath.Abs(filepath.Join(o.build, "images.tar"))
	if err != nil {
		return nil, err
	}
	return c, os.Symlink(archive, filepath.Join(images, "images.tar"))
}

// directories are the flags that say which node is meant.
func (c *cluster) directories() []string {
	return []string{"--data-dir", filepath.Join(c.dir, "data"), "--run-dir", filepath.Join(c.dir, "run"), "--node-name", nodeName}
}

func (c *cluster) kubeconfig() string { return filepath.Join(c.dir, "kubeconfig") }
func (c *cluster) log() string        { return filepath.Join(c.o.report, "kedge.log") }

// start returns when the node and its images are ready.
func (c *cluster) start(ctx context.Context) error {
	args := append([]string{"server", "--write-kubeconfig", c.kubeconfig(), "--node-ip", nodeAddr.Addr().String(), "--tls-san", nodeAddr.Addr().String()}, c.directories()...)
	c.server = exec.Command(c.o.kedge, append(args, c.o.serverFlags...)...)
	log, err := os.Create(c.log())
	if err != nil {
		return err
	}
	defer log.Close()
	c.server.Stdout, c.server.Stderr = log, log
	// kedge tells its service manager when everything is ready (sd_notify); here that is us.
	notified := filepath.Join(c.dir, "notify")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notified, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer notify.Close()
	c.server.Env = append(os.Environ(), "NOTIFY_SOCKET="+notified)
	ready := make(chan struct{})
	go func() {
		buf := make([]byte, 1024)
		for {
			n, err := notify.Read(buf)
			if err != nil {
				return
			}
			if strings.Contains(string(buf[:n]), "READY=1") {
				close(ready)
				return
			}
		}
	}()
	if err := c.node.Start(c.server); err != nil {
		return fmt.Errorf("start kedge: %w", err)
	}
	go func() { c.ended <- c.server.Wait() }()
	select {
	case <-ready:
	case err := <-c.ended:
		c.server = nil
		return fmt.Errorf("kedge ended: %w\n%s", err, tail(c.log(), 20))
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(5 * time.Minute):
		return fmt.Errorf("the node did not get ready within five minutes\n%s", tail(c.log(), 20))
	}
	// The kubeconfig names the machine itself; the user is on another one.
	data, err := os.ReadFile(c.kubeconfig())
	if err != nil {
		return err
	}
	return os.WriteFile(c.kubeconfig(), []byte(strings.ReplaceAll(string(data), "127.0.0.1", nodeAddr.Addr().String())), 0o600)
}

// close ends the node with its pods and removes what was made.
func (c *cluster) close(keep bool) error {
	var errs []error
	if c.server != nil {
		errs = append(errs, c.server.Process.Signal(syscall.SIGTERM))
		select {
		case <-c.ended:
		case <-time.After(30 * time.Second):
			errs = append(errs, errors.New("kedge does not stop; killed"), c.server.Process.Kill())
			<-c.ended
		}
		kill := exec.Command(c.o.kedge, append([]string{"killall"}, c.directories()...)...)
		if err := c.node.Start(kill); err != nil {
			errs = append(errs, err)
		} else if err := kill.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("kedge killall: %w", err))
		}
	}
	if c.lan != nil {
		errs = append(errs, c.lan.Close())
	}
	if !keep {
		errs = append(errs, os.RemoveAll(c.dir))
	}
	return errors.Join(errs...)
}
