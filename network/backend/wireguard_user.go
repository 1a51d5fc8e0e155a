package backend

import (
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	wireguard "golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// userWireGuard is WireGuard in this process, on a TUN device. Packets wait while kedge is
// not running.
type userWireGuard struct{ device *wireguard.Device }

func newUserWireGuard(name string, mtu int, log *slog.Logger) (*userWireGuard, error) {
	// With virtio-net headers the kernel hands over large segments, and WireGuard sends
	// several packets at a time, which multiplies the throughput.
	f, err := attachTUN(name, unix.IFF_VNET_HDR)
	if err != nil {
		return nil, err
	}
	t, err := tun.CreateTUNFromFile(f, mtu)
	if err != nil {
		f.Close()
		return nil, err
	}
	logf := func(format string, args ...any) { log.Debug("WireGuard: " + fmt.Sprintf(format, args...)) }
	d := wireguard.NewDevice(t, conn.NewDefaultBind(), &wireguard.Logger{Verbosef: wireguard.DiscardLogf, Errorf: logf})
	return &userWireGuard{d}, nil
}

// peers returns nil: the state of the device begins with the process.
func (u *userWireGuard) peers() ([]wgtypes.Key, error) { return nil, nil }

func (u *userWireGuard) configure(c wgtypes.Config) error {
	var b strings.Builder
	set := func(name string, value any) { fmt.Fprintf(&b, "%s=%v\n", name, value) }
	key := func(k wgtypes.Key) string { return hex.EncodeToString(k[:]) }
	if c.PrivateKey != nil {
		set("private_key", key(*c.PrivateKey))
	}
	if c.ListenPort != nil {
		set("listen_port", *c.ListenPort)
	}
	for _, p := range c.Peers {
		set("public_key", key(p.PublicKey))
		if p.Remove {
			set("remove", true)
			continue
		}
		if p.ReplaceAllowedIPs {
			set("replace_allowed_ips", true)
		}
		for _, a := range p.AllowedIPs {
			set("allowed_ip", a.String())
		}
		if p.Endpoint != nil {
			set("endpoint", p.Endpoint.AddrPort())
		}
		if p.PersistentKeepaliveInterval != nil {
			set("persistent_keepalive_interval", int(p.PersistentKeepaliveInterval.Seconds()))
		}
	}
	if err := u.device.IpcSet(b.String()); err != nil {
		return err
	}
	return u.device.Up()
}

func (u *userWireGuard) gone() <-chan struct{} { return u.device.Wait() }

func (u *userWireGuard) close() { u.device.Close() }
