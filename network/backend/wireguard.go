package backend

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"kedge/internal/atomicfile"
)

// planWireGuard returns one interface with routes to all peers, for both address families.
// The type wireGuard manages peers and keys.
func planWireGuard(cfg Config, own node, peers []node, mtu int) (plan, error) {
	p, err := planUDP(cfg, own, peers, mtu)
	for i := range p.links {
		p.links[i].wireguard = true
	}
	return p, err
}

// keepAlive is the interval of keepalive packets of an idle node, so that routers on the
// path let the peer's packets in. The first one is sent at once: after a change of keys it
// starts the session.
const keepAlive = 25 * time.Second

// handshakeDelay is the time for which the node with the greater public key waits for the
// other's handshake before it sends its own. Two nodes often learn of each other at the
// same moment, and two handshakes that cross invalidate each other: the protocol repeats
// them only after five seconds.
const handshakeDelay = 500 * time.Millisecond

// wireGuard is the node's key and the peers of its interface.
//
// The key authenticates the node: it is published in the Node object, which no other node
// may write. The key changes periodically and at each start of kedge: the new key is
// published first, then used, and every peer that has read it starts a session with it.
// Until the API has delivered it to the peers, packets wait or are lost; connections
// survive that.
type wireGuard struct {
	port    int
	file    string // of the key, which does not survive a reboot
	log     *slog.Logger
	now     func() time.Time
	keyLife time.Duration
	change  func() // requests another round

	// The following fields belong to the goroutine that calls round.
	key    wgtypes.Key // in use; zero before the first was published
	next   wgtypes.Key // published or about to be; zero for none
	since  time.Time   // start of the key's use; zero if an earlier process started it
	link   string
	device wgDevice // nil while there is no interface
	have   map[wgtypes.Key]wgPeer
	seen   map[wgtypes.Key]sighting
}

// sighting is the time at which a peer's key was first seen, and the node that published
// it. If another node publishes the same key later, the key stays the first node's: only
// that node can have the private half.
type sighting struct {
	at   time.Time
	node string
}

// wgDevice is a WireGuard interface: of the kernel or of this process.
type wgDevice interface {
	// peers returns the public keys that the interface has already.
	peers() ([]wgtypes.Key, error)
	// configure changes the given settings and leaves the others.
	configure(wgtypes.Config) error
	// gone is closed when the interface is gone. It is nil if the kernel reports it.
	gone() <-chan struct{}
	close()
}

// wgPeer is the interface's configuration of another node. It is comparable.
type wgPeer struct {
	at        netip.AddrPort
	allowed   string // prefixes, sorted, separated by commas
	keepalive bool   // keepalive packets are sent, the first one at once
}

// newWireGuard reads the key of an earlier process.
func newWireGuard(cfg Config, change func(), log *slog.Logger) (*wireGuard, error) {
	w := &wireGuard{port: cfg.WireGuardPort, file: cfg.KeyFile, log: log, now: time.Now, keyLife: cfg.KeyLife, change: change}
	text, err := os.ReadFile(w.file)
	if errors.Is(err, fs.ErrNotExist) {
		return w, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the node's WireGuard key: %w", err)
	}
	if w.key, err = wgtypes.ParseKey(strings.TrimSpace(string(text))); err != nil {
		log.Warn("the node's WireGuard key is damaged; generating a new one", "file", w.file, "err", err)
		w.key = wgtypes.Key{}
	}
	return w, nil
}

// publish returns the public key to publish.
func (w *wireGuard) publish() (string, error) {
	if w.next == (wgtypes.Key{}) && (w.since.IsZero() || w.now().Sub(w.since) >= w.keyLife) {
		var err error
		if w.next, err = wgtypes.GeneratePrivateKey(); err != nil {
			return "", fmt.Errorf("generate a WireGuard key: %w", err)
		}
	}
	if w.next != (wgtypes.Key{}) {
		return w.next.PublicKey().String(), nil
	}
	return w.key.PublicKey().String(), nil
}

// untilRotation is the remaining lifetime of the key.
func (w *wireGuard) untilRotation() time.Duration {
	return max(time.Second, w.keyLife-w.now().Sub(w.since))
}

// published records that the API has accepted the key.
func (w *wireGuard) published() error {
	if w.next == (wgtypes.Key{}) {
		return nil
	}
	if err := atomicfile.MkdirAll(filepath.Dir(w.file), 0o700); err != nil {
		return fmt.Errorf("save the node's WireGuard key: %w", err)
	}
	if err := atomicfile.Write(w.file, []byte(w.next.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("save the node's WireGuard key: %w", err)
	}
	first := w.key == wgtypes.Key{}
	w.key, w.next, w.since = w.next, wgtypes.Key{}, w.now()
	if w.device != nil {
		if err := w.device.configure(wgtypes.Config{PrivateKey: &w.key}); err != nil {
			w.release() // the next round opens it again
			return fmt.Errorf("change the key of %s: %w", w.link, err)
		}
	}
	if !first {
		w.log.Info("this node's WireGuard key was rotated")
	}
	return nil
}

// set configures the peers of the interface. link is its name, empty if there is none.
func (w *wireGuard) set(ctx context.Context, link string, own node, peers []node) error {
	if w.device != nil {
		select {
		case <-w.device.gone():
			w.release()
		default:
		}
	}
	if link == "" || w.key == (wgtypes.Key{}) {
		w.release()
		return nil
	}
	if w.device == nil {
		if err := w.open(ctx, link); err != nil {
			return err
		}
	}
	want, errs := w.wantedPeers(own, peers)
	var c wgtypes.Config
	for key := range w.have {
		if _, ok := want[key]; !ok {
			c.Peers = append(c.Peers, wgtypes.PeerConfig{PublicKey: key, Remove: true})
		}
	}
	interval, wait := keepAlive, time.Duration(0)
	for key, p := range want {
		if !p.keepalive {
			wait = handshakeDelay
		}
		if have, ok := w.have[key]; ok && have == p {
			continue
		}
		peer := wgtypes.PeerConfig{PublicKey: key, Endpoint: net.UDPAddrFromAddrPort(p.at), ReplaceAllowedIPs: true}
		if p.keepalive {
			peer.PersistentKeepaliveInterval = &interval
		}
		for s := range strings.SplitSeq(p.allowed, ",") {
			peer.AllowedIPs = append(peer.AllowedIPs, *ipNet(netip.MustParsePrefix(s)))
		}
		c.Peers = append(c.Peers, peer)
	}
	if wait > 0 {
		time.AfterFunc(wait, w.change)
	}
	if len(c.Peers) == 0 {
		return errors.Join(errs...)
	}
	// Old keys first: an address belongs to one peer.
	slices.SortStableFunc(c.Peers, func(a, b wgtypes.PeerConfig) int {
		return map[bool]int{true: 0, false: 1}[a.Remove] - map[bool]int{true: 0, false: 1}[b.Remove]
	})
	if err := w.device.configure(c); err != nil {
		w.release()
		return errors.Join(append(errs, fmt.Errorf("configure the peers of %s: %w", link, err))...)
	}
	w.have = want
	return errors.Join(errs...)
}

// wantedPeers returns the wanted peers of the interface. Packets from a peer are accepted
// only with source addresses of its pods and its own.
func (w *wireGuard) wantedPeers(own node, peers []node) (map[wgtypes.Key]wgPeer, []error) {
	out := map[wgtypes.Key]wgPeer{}
	seen := map[wgtypes.Key]sighting{}
	mine, now := w.key.PublicKey(), w.now()
	var errs []error
	known := func(p node) int { // nodes whose keys were seen before come first
		if key, err := wgtypes.ParseKey(p.key); err == nil && w.seen[key].node == p.name {
			return 0
		}
		return 1
	}
	for _, p := range slices.SortedStableFunc(slices.Values(peers), func(a, b node) int { return known(a) - known(b) }) {
		at, err := between(own, p)
		if err != nil {
			continue // the plan has reported it
		}
		key, err := wgtypes.ParseKey(p.key)
		if err != nil {
			errs = append(errs, fmt.Errorf("node %s has no valid WireGuard key", p.name))
			continue
		}
		if first, taken := seen[key]; taken || key == mine {
			errs = append(errs, fmt.Errorf("node %s has the WireGuard key of node %s: its pods cannot be reached", p.name, cmp.Or(first.node, own.name)))
			continue
		}
		var allowed []string
		for _, r := range p.ranges {
			allowed = append(allowed, r.String())
		}
		for _, a := range p.addrs {
			allowed = append(allowed, netip.PrefixFrom(a, a.BitLen()).String())
		}
		slices.Sort(allowed)
		s, ok := w.seen[key]
		if !ok {
			s.at = now
		}
		seen[key] = sighting{s.at, p.name}
		out[key] = wgPeer{
			at: netip.AddrPortFrom(at, uint16(w.port)), allowed: strings.Join(slices.Compact(allowed), ","),
			keepalive: bytes.Compare(mine[:], key[:]) < 0 || now.Sub(s.at) >= handshakeDelay,
		}
	}
	w.seen = seen
	return out, errs
}

// open opens the interface that ensureDevice has created.
func (w *wireGuard) open(ctx context.Context, name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	var d wgDevice
	if link.Type() == wireGuardType {
		d, err = newKernelWireGuard(name)
	} else {
		d, err = newUserWireGuard(name, link.Attrs().MTU, w.log)
	}
	if err != nil {
		return fmt.Errorf("use %s: %w", name, err)
	}
	known, err := d.peers()
	if err == nil {
		err = d.configure(wgtypes.Config{PrivateKey: &w.key, ListenPort: &w.port})
	}
	if err != nil {
		d.close()
		return fmt.Errorf("start WireGuard on %s: %w", name, err)
	}
	w.link, w.device, w.have = name, d, map[wgtypes.Key]wgPeer{}
	for _, key := range known {
		w.have[key] = wgPeer{} // differs from any wanted peer
	}
	if gone := d.gone(); gone != nil {
		go func() {
			select {
			case <-ctx.Done():
			case <-gone:
				w.change()
			}
		}()
	}
	return nil
}

// release closes the handle of the interface. The kernel's interface continues to work.
func (w *wireGuard) release() {
	if w.device != nil {
		w.device.close()
	}
	w.device, w.have = nil, nil
}

// wireGuardType is the kernel's name of the interface type.
const wireGuardType = "wireguard"

// createWireGuard creates an interface of the kernel or, if the kernel has no WireGuard, a
// TUN device for this process.
func createWireGuard(attrs netlink.LinkAttrs) error {
	err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return netlink.LinkAdd(tunDevice(attrs))
	}
	return err
}
