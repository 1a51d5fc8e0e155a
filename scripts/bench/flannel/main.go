// Command flannel runs one of flannel's own backends on a machine, for comparing kedge's with it. It is a
// module of its own, so that its dependencies are not in kedge's go.mod.
//
// flanneld gets the list of machines from an API server or etcd; this program gets it from its parent process.
// It prints one line, the report, when the machine's own end is set up. It reads the leases of other machines
// from standard input, one per line, in the form of those machines' reports, and runs until its input ends.
// Like flanneld it leaves its kernel objects behind.
//
// Flannel's backend udp is not supported, because it is written in C, and this program is built without a C
// compiler. The backend wireguard needs the kernel's WireGuard.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/flannel-io/flannel/pkg/backend"
	_ "github.com/flannel-io/flannel/pkg/backend/hostgw"
	_ "github.com/flannel-io/flannel/pkg/backend/vxlan"
	_ "github.com/flannel-io/flannel/pkg/backend/wireguard"
	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
)

// report describes a machine for the other machines, and for its pods.
type report struct {
	MTU   int // MTU of pods' interfaces
	Lease lease.Lease
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "flannel:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	flags := flag.NewFlagSet("flannel", flag.ContinueOnError)
	mode := flags.String("backend", "vxlan", "host-gw, vxlan or wireguard")
	link := flags.String("interface", "eth0", "the machine's interface towards the others")
	addr := flags.String("address", "", "its address")
	network := flags.String("network", "", "range of all pods")
	pods := flags.String("subnet", "", "range of this machine's pods")
	if err := flags.Parse(args); err != nil {
		return err
	}
	config, err := subnet.ParseConfig(fmt.Sprintf(`{"Network": %q, "Backend": {"Type": %q}}`, *network, *mode))
	if err != nil {
		return fmt.Errorf("-network %q: %w", *network, err)
	}
	_, own, err := net.ParseCIDR(*pods)
	if err != nil {
		return fmt.Errorf("-subnet: %w", err)
	}
	outside, err := external(*link, *addr)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	leases := newLeases(config, ip.FromIPNet(own))
	made, err := backend.NewManager(ctx, leases, outside).GetBackend(*mode)
	if err != nil {
		return err
	}
	var parts sync.WaitGroup
	way, err := made.RegisterNetwork(ctx, &parts, config)
	if err != nil {
		return err
	}
	parts.Go(func() { way.Run(ctx) })
	err = json.NewEncoder(out).Encode(report{way.MTU(), *way.Lease()})
	if err == nil {
		err = leases.read(ctx, in)
	}
	cancel()
	parts.Wait()
	return err
}

// external returns the interface towards the other machines as flanneld would find it.
func external(link, addr string) (*backend.ExternalInterface, error) {
	a := net.ParseIP(addr)
	if a == nil {
		return nil, fmt.Errorf("-address %q is not an address", addr)
	}
	i, err := net.InterfaceByName(link)
	if err != nil {
		return nil, fmt.Errorf("-interface %s: %w", link, err)
	}
	return &backend.ExternalInterface{Iface: i, IfaceName: link, IfaceAddr: a, ExtAddr: a}, nil
}

// read passes on the leases from the input until it ends or ctx is cancelled.
func (l *leases) read(ctx context.Context, in io.Reader) error {
	failed := make(chan error, 1)
	go func() {
		lines := bufio.NewScanner(in)
		for lines.Scan() {
			var other lease.Lease
			if err := json.Unmarshal(lines.Bytes(), &other); err != nil {
				failed <- fmt.Errorf("lease %q: %w", lines.Bytes(), err)
				return
			}
			select {
			case l.others <- other:
			case <-ctx.Done():
			}
		}
		failed <- lines.Err()
	}()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
		return nil
	}
}
