package backend

import (
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// kernelWireGuard is a WireGuard interface of the kernel. Packets flow while kedge is not
// running.
type kernelWireGuard struct {
	name   string
	client *wgctrl.Client
}

func newKernelWireGuard(name string) (*kernelWireGuard, error) {
	c, err := wgctrl.New()
	if err != nil {
		return nil, err
	}
	return &kernelWireGuard{name, c}, nil
}

func (k *kernelWireGuard) peers() ([]wgtypes.Key, error) {
	d, err := k.client.Device(k.name)
	if err != nil {
		return nil, err
	}
	var keys []wgtypes.Key
	for _, p := range d.Peers {
		keys = append(keys, p.PublicKey)
	}
	return keys, nil
}

func (k *kernelWireGuard) configure(c wgtypes.Config) error {
	return k.client.ConfigureDevice(k.name, c)
}

// gone returns nil: the backend watches the kernel's interfaces, and configure fails if the
// interface does not exist.
func (k *kernelWireGuard) gone() <-chan struct{} { return nil }

func (k *kernelWireGuard) close() { _ = k.client.Close() } // every request has been answered
