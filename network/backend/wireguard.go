package backend

import (
	"bytes"
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

// planWireGuard is one interface with routes to all peers, whatever families the nodes
// have. The peers and their keys are wireGuard's.
func planWireGuard(cfg Config, own node, peers []node, mtu int) (plan, error) {
	p, err := planUDP(cfg, own, peers, mtu)
	for i := range p.links {
		p.links[i].wireguard = true
	}
	return p, err
}

// keepAlive is how often a node that has nothing to say says that it is there, so that
// routers on the way let the peer's packets in. The first time is at once: after a
// change of keys it is what makes two nodes meet again.
const keepAlive = 25 * time.Second

// courtesy is how long the one of two nodes that has the greater public key waits for the
// other's greeting before it sends its own. Two nodes often hear of each other at the same
// moment, and of two greetings that cross each other both are void: the protocol repeats
// them after five seconds only.
const courtesy = 500 * time.Millisecond

// wireGuard is the node's key and its interface's peers.
//
// A node proves itself by a key that it publishes in its Node object, which no other node
// may write. The key changes now and then, and at each start of kedge: first the new one
// is published, then it is used, and every peer that has read it greets the node with it.
// In between, for as long as the API takes to tell the peers, packets wait or are lost;
// connections live through that.
type wireGuard struct {
	port   int
	file   string // the key's, which does not survive a reboot
	log    *slog.Logger
	now    func() time.Time
	life   time.Duration
	change func() // asks for another round

	// What follows belongs to the goroutine that calls round.
	key    wgtypes.Key // in use; zero before the first was published
	next   wgtypes.Key // published or about to be; zero for none
	since  time.Time   // key is in use; zero if by an earlier process
	link   string
	device wgDevice // nil while there is no interface
	have   map[wgtypes.Key]wgPeer
	met    map[wgtypes.Key]time.Time // when the peer's key was first seen
}

// wgDevice is an interface that speaks WireGuard: the kernel's or this process's.
type wgDevice interface {
	// peers are the public keys that the interface knows already.
	peers() ([]wgtypes.Key, error)
	// configure changes what is given and leaves the rest.
	configure(wgtypes.Config) error
	// gone is closed when the interface has gone. It is nil where the kernel says so.
	gone() <-chan struct{}
	close()
}

// wgPeer is what the interface knows of another node. It is comparable.
type wgPeer struct {
	at      netip.AddrPort
	allowed string // prefixes, sorted, separated by commas
	greeted bool   // it is sent something now and then, and at once when that begins
}

// newWireGuard reads the key that an earlier process has left.
func newWireGuard(cfg Config, change func(), log *slog.Logger) (*wireGuard, error) {
	w := &wireGuard{port: cfg.WireGuardPort, file: cfg.KeyFile, log: log, now: time.Now, life: cfg.KeyLife, change: change}
	text, err := os.ReadFile(w.file)
	if errors.Is(err, fs.ErrNotExist) {
		return w, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the node's key for WireGuard: %w", err)
	}
	if w.key, err = wgtypes.ParseKey(strings.TrimSpace(string(text))); err != nil {
		log.Warn("the node's key for WireGuard is damaged and will be another", "file", w.file, "err", err)
		w.key = wgtypes.Key{}
	}
	return w, nil
}

// publish returns the key that the other nodes are to know.
func (w *wireGuard) publish() (string, error) {
	if w.next == (wgtypes.Key{}) && (w.since.IsZero() || w.now().Sub(w.since) >= w.life) {
		var err error
		if w.next, err = wgtypes.GeneratePrivateKey(); err != nil {
			return "", fmt.Errorf("make a key for WireGuard: %w", err)
		}
	}
	if w.next != (wgtypes.Key{}) {
		return w.next.PublicKey().String(), nil
	}
	return w.key.PublicKey().String(), nil
}

// due is how long the key is good for.
func (w *wireGuard) due() time.Duration { return max(time.Second, w.life-w.now().Sub(w.since)) }

// published notes that the API has taken the key.
func (w *wireGuard) published() error {
	if w.next == (wgtypes.Key{}) {
		return nil
	}
	if err := atomicfile.MkdirAll(filepath.Dir(w.file), 0o700); err != nil {
		return fmt.Errorf("keep the node's key for WireGuard: %w", err)
	}
	if err := atomicfile.Write(w.file, []byte(w.next.String()+"\n"), 0o600); err != nil {
		return fmt.Errorf("keep the node's key for WireGuard: %w", err)
	}
	first := w.key == wgtypes.Key{}
	w.key, w.next, w.since = w.next, wgtypes.Key{}, w.now()
	if w.device != nil {
		if err := w.device.configure(wgtypes.Config{PrivateKey: &w.key}); err != nil {
			w.drop() // the next round makes it anew
			return fmt.Errorf("change the key of %s: %w", w.link, err)
		}
	}
	if !first {
		w.log.Info("this node has another key for WireGuard")
	}
	return nil
}

// set makes the interface know the peers. link is its name, empty if there is none.
func (w *wireGuard) set(ctx context.Context, link string, own node, peers []node) error {
	if w.device != nil {
		select {
		case <-w.device.gone():
			w.drop()
		default:
		}
	}
	if link == "" || w.key == (wgtypes.Key{}) {
		w.drop()
		return nil
	}
	if w.device == nil {
		if err := w.open(ctx, link); err != nil {
			return err
		}
	}
	want, errs := w.want(own, peers)
	var c wgtypes.Config
	for key := range w.have {
		if _, ok := want[key]; !ok {
			c.Peers = append(c.Peers, wgtypes.PeerConfig{PublicKey: key, Remove: true})
		}
	}
	interval, wait := keepAlive, time.Duration(0)
	for key, p := range want {
		if !p.greeted {
			wait = courtesy
		}
		if have, ok := w.have[key]; ok && have == p {
			continue
		}
		peer := wgtypes.PeerConfig{PublicKey: key, Endpoint: net.UDPAddrFromAddrPort(p.at), ReplaceAllowedIPs: true}
		if p.greeted {
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
		w.drop()
		return errors.Join(append(errs, fmt.Errorf("tell %s of the other nodes: %w", link, err))...)
	}
	w.have = want
	return errors.Join(errs...)
}

// want is what the interface should know. What a peer sends is let in only with the
// addresses of its pods, and its own.
func (w *wireGuard) want(own node, peers []node) (map[wgtypes.Key]wgPeer, []error) {
	out := map[wgtypes.Key]wgPeer{}
	met := map[wgtypes.Key]time.Time{}
	mine, now := w.key.PublicKey(), w.now()
	var errs []error
	for _, p := range peers {
		at, err := between(own, p)
		if err != nil {
			continue // the plan has reported it
		}
		key, err := wgtypes.ParseKey(p.key)
		if err != nil {
			errs = append(errs, fmt.Errorf("node %s has no key for WireGuard that can be read", p.name))
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
		since, ok := w.met[key]
		if !ok {
			since = now
		}
		met[key] = since
		out[key] = wgPeer{
			at: netip.AddrPortFrom(at, uint16(w.port)), allowed: strings.Join(slices.Compact(allowed), ","),
			greeted: bytes.Compare(mine[:], key[:]) < 0 || now.Sub(since) >= courtesy,
		}
	}
	w.met = met
	return out, errs
}

// open takes the interface that ensureDevice has made.
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
		return fmt.Errorf("begin WireGuard at %s: %w", name, err)
	}
	w.link, w.device, w.have = name, d, map[wgtypes.Key]wgPeer{}
	for _, key := range known {
		w.have[key] = wgPeer{} // it is compared with what should be, and is something else
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

// drop lets go of the interface. The kernel's goes on.
func (w *wireGuard) drop() {
	if w.device != nil {
		w.device.close()
	}
	w.device, w.have = nil, nil
}

// wireGuardType is what the kernel calls interfaces of this kind.
const wireGuardType = "wireguard"

// createWireGuard makes an interface of the kernel's, or where it has no WireGuard a TUN
// device for this process.
func createWireGuard(attrs netlink.LinkAttrs) error {
	err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return netlink.LinkAdd(tunDevice(attrs))
	}
	return err
}
