package kernelnet

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// machine is one whose addresses a test changes.
type machine struct {
	mu    sync.Mutex
	addrs []netip.Addr
	err   error
}

func (m *machine) set(f *AddressFollower, err error, addrs ...string) {
	m.mu.Lock()
	m.addrs, m.err = nil, err
	for _, a := range addrs {
		m.addrs = append(m.addrs, netip.MustParseAddr(a))
	}
	m.mu.Unlock()
	f.Refresh()
}

func (m *machine) find() ([]netip.Addr, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.addrs, m.err
}

func TestAddressFollower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
		f := NewAddressFollower(m.addrs, m.find, slog.New(slog.DiscardHandler))
		var mu sync.Mutex // guards what follows
		var order []string
		var told [][]netip.Addr
		trouble := 0
		f.OnChange("good", func(a []netip.Addr) error {
			mu.Lock()
			defer mu.Unlock()
			order, told = append(order, "good"), append(told, a)
			return nil
		})
		f.OnChange("slow", func([]netip.Addr) error {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, "slow")
			if trouble > 0 {
				trouble--
				return errors.New("not now")
			}
			return nil
		})
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); f.loop(ctx) }()
		expect := func(after time.Duration, what string, want ...string) {
			t.Helper()
			mu.Lock()
			order = nil
			mu.Unlock()
			time.Sleep(after)
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(order, want) {
				t.Errorf("%s: told %v, want %v", what, order, want)
			}
		}

		f.Refresh()
		expect(2*settle, "nothing has changed")
		m.set(f, nil, "192.0.2.2")
		expect(settle/2, "before it has settled")
		m.set(f, nil, "192.0.2.3") // settles anew
		expect(settle-time.Millisecond, "still before")
		expect(2*time.Millisecond, "it has settled", "good", "slow")
		if len(told) != 1 || told[0][0] != netip.MustParseAddr("192.0.2.3") || f.Get()[0] != told[0][0] {
			t.Errorf("told %v, and it says %v", told, f.Get())
		}
		m.set(f, ErrNoAddress)
		expect(2*settle, "no address at all")
		if f.Get()[0] != netip.MustParseAddr("192.0.2.3") {
			t.Errorf("without an address it says %v", f.Get())
		}
		mu.Lock()
		trouble = 2
		mu.Unlock()
		m.set(f, nil, "192.0.2.4", "2001:db8::4")
		expect(2*settle, "one cannot follow", "good", "slow")
		expect(retryInterval, "it is told again, alone", "slow")
		expect(retryInterval, "and again", "slow")
		expect(2*retryInterval, "it has followed")
		stop()
		<-done
	})
}

// TestNoise: something changes all the time, and the machine is looked at all the same.
func TestNoise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &machine{addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}}
		f := NewAddressFollower(m.addrs, m.find, slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); f.loop(ctx) }()
		m.set(f, nil, "192.0.2.2")
		for range 2 * maxSettle / (settle / 4) {
			time.Sleep(settle / 4)
			f.Refresh()
		}
		if got := f.Get()[0].String(); got != "192.0.2.2" {
			t.Errorf("it says %s", got)
		}
		stop()
		<-done
	})
}
