package host

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kedge/throwaway/lan"
)

// Fault says how bad one direction of a host's cable is. The zero value is a good cable.
// Shares are between 0 and 1.
type Fault struct {
	Delay     time.Duration // of every packet
	Jitter    time.Duration // greatest difference of the delay, both ways; packets stay in order
	Loss      float64       // share of packets that are lost; 1 cuts this direction
	Duplicate float64       // share of packets that arrive twice
	Reorder   float64       // share of packets that are not delayed and so overtake others
	Rate      int64         // bytes a second; 0 for no limit
}

// Validate reports settings that make no sense.
func (f Fault) Validate() error {
	var errs []error
	for _, share := range []struct {
		name  string
		value float64
	}{{"loss", f.Loss}, {"duplicate", f.Duplicate}, {"reorder", f.Reorder}} {
		if share.value < 0 || share.value > 1 {
			errs = append(errs, fmt.Errorf("%s %v is not between 0 and 1", share.name, share.value))
		}
	}
	if f.Delay < 0 || f.Jitter < 0 || f.Jitter > f.Delay {
		errs = append(errs, fmt.Errorf("delay %s with jitter %s: neither can be negative, nor the jitter larger than the delay", f.Delay, f.Jitter))
	}
	if f.Reorder > 0 && f.Delay == 0 {
		errs = append(errs, errors.New("without a delay no packet can overtake another"))
	}
	if f.Rate < 0 {
		errs = append(errs, fmt.Errorf("rate %d is negative", f.Rate))
	}
	return errors.Join(errs...)
}

// Cable is the cable between a host and its switch, which a test can make bad: slow, lossy, or deaf in one direction.
// A relay in this process takes the place of the direct connection, so kernels without netem are enough.
type Cable struct {
	host *lan.Host

	mu    sync.Mutex
	fault *fault // nil while the cable is good
}

// CableOf returns the cable of a host. A host has one value of it at a time: what another value
// has impaired cannot be repaired by this one.
func CableOf(h *lan.Host) *Cable { return &Cable{host: h} }

// fault is a relay between a host's cable and the switch, in place of the direct
// connection: [cable] = relay = [tap] - [switch]. A kernel without netem is enough.
type fault struct {
	out, in   *relay // from the host, to the host
	cable     *os.File
	tap       *os.File
	restore   func() error
	reconnect func() error
}

// Impair makes the cable bad: out applies to packets that the host sends, in to packets that
// it receives. The fault lasts until Repair, another Impair, or the end of this process.
// Packets under way when a fault begins or ends may be lost.
func (c *Cable) Impair(out, in Fault) error {
	if err := errors.Join(out.Validate(), in.Validate()); err != nil {
		return fmt.Errorf("impair the cable of host %s: %w", c.host.Name, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fault != nil {
		c.fault.out.set(out)
		c.fault.in.set(in)
		return nil
	}
	f, err := newFault(c.host, out, in)
	if err != nil {
		return fmt.Errorf("impair the cable of host %s: %w", c.host.Name, err)
	}
	c.fault = f
	return nil
}

// Repair undoes Impair. It must be called before the host or its LAN is closed.
func (c *Cable) Repair() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fault == nil {
		return nil
	}
	err := c.fault.close()
	c.fault = nil
	if err != nil {
		return fmt.Errorf("repair the cable of host %s: %w", c.host.Name, err)
	}
	return nil
}

func newFault(h *lan.Host, out, in Fault) (_ *fault, err error) {
	nl := h.LAN().Netlink()
	cable, err := nl.LinkByName(h.Port())
	if err != nil {
		return nil, err
	}
	bridge, err := nl.LinkByName(lan.Bridge)
	if err != nil {
		return nil, err
	}
	f := &fault{reconnect: func() error { return nl.LinkSetMaster(cable, bridge) }}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.close())
		}
	}()
	// The relay must take whole packets with their checksums off the cable: the kernel
	// leaves both undone between the ends of a virtual cable.
	if f.restore, err = offloadsOff(h); err != nil {
		return nil, err
	}
	tapName := "f" + h.Port()
	err = h.LAN().Do(func() (err error) {
		if f.cable, err = packetSocket(cable.Attrs().Index); err != nil {
			return err
		}
		f.tap, err = newTap(tapName)
		return err
	})
	if err != nil {
		return nil, err
	}
	tap, err := nl.LinkByName(tapName)
	if err != nil {
		return nil, err
	}
	if err := nl.LinkSetMTU(tap, cable.Attrs().MTU); err != nil {
		return nil, err
	}
	if err := nl.LinkSetNoMaster(cable); err != nil {
		return nil, err
	}
	if err := nl.LinkSetMaster(tap, bridge); err != nil {
		return nil, err
	}
	if err := nl.LinkSetUp(tap); err != nil {
		return nil, err
	}
	f.out, f.in = startRelay(f.cable, f.tap, out), startRelay(f.tap, f.cable, in)
	return f, nil
}

// close connects the cable to the switch again.
func (f *fault) close() error {
	var errs []error
	for _, file := range []*os.File{f.cable, f.tap} {
		if file != nil {
			errs = append(errs, file.Close())
		}
	}
	for _, r := range []*relay{f.out, f.in} {
		if r != nil {
			r.wait()
		}
	}
	if err := f.reconnect(); err != nil && !errors.Is(err, unix.ENODEV) {
		errs = append(errs, err)
	}
	if f.restore != nil {
		errs = append(errs, f.restore())
	}
	return errors.Join(errs...)
}

// packetSocket reads and writes frames on an interface of the calling thread's namespace.
func packetSocket(index int) (*os.File, error) {
	const everything = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // in the byte order of the network
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, everything)
	if err != nil {
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	err = unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: everything, Ifindex: index})
	}
	if err == nil {
		// As much as the relay's own queue.
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, queueLimit*2048)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("packet socket: %w", err)
	}
	return os.NewFile(uintptr(fd), "packet socket"), nil
}

// newTap makes a tap interface, which exists as long as the file is open.
func newTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun, which an impaired cable needs: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make a tap interface: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// offloadsOff makes the host's end of the cable send finished packets. The function that it
// returns undoes that.
func offloadsOff(h *lan.Host) (func() error, error) {
	before, err := setOffloads(h, map[uint32]uint32{unix.ETHTOOL_STXCSUM: 0, unix.ETHTOOL_STSO: 0, unix.ETHTOOL_SGSO: 0})
	if err != nil {
		return nil, err
	}
	return func() error {
		_, err := setOffloads(h, before)
		if errors.Is(err, unix.ENODEV) {
			err = nil // the host or its link is gone
		}
		return err
	}, nil
}

// setOffloads sets features of the uplink and returns their previous values.
func setOffloads(h *lan.Host, features map[uint32]uint32) (map[uint32]uint32, error) {
	get := map[uint32]uint32{unix.ETHTOOL_STXCSUM: unix.ETHTOOL_GTXCSUM, unix.ETHTOOL_STSO: unix.ETHTOOL_GTSO, unix.ETHTOOL_SGSO: unix.ETHTOOL_GGSO}
	before := map[uint32]uint32{}
	err := h.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		// Segmentation depends on checksums: they are switched off last and on first.
		order := []uint32{unix.ETHTOOL_STSO, unix.ETHTOOL_SGSO, unix.ETHTOOL_STXCSUM}
		if features[unix.ETHTOOL_STXCSUM] != 0 {
			order = []uint32{unix.ETHTOOL_STXCSUM, unix.ETHTOOL_SGSO, unix.ETHTOOL_STSO}
		}
		for _, set := range order {
			if before[set], err = ethtool(fd, lan.Uplink, get[set], 0); err != nil {
				return err
			}
		}
		for _, set := range order {
			if _, err := ethtool(fd, lan.Uplink, set, features[set]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("set features of the uplink: %w", err)
	}
	return before, nil
}
