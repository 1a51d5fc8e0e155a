package kernelnet

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"kedge/internal/lifecycle"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// settle is how long the network must be quiet before the addresses are read: a machine
	// that moves to another network loses its address and routes before it gets others.
	settle = time.Second
	// maxSettle bounds the wait where the network changes all the time.
	maxSettle = 5 * time.Second
	// retryInterval is the pause before a listener that has failed is called again.
	retryInterval = 5 * time.Second
)

// AddressFollower is the component that follows changes of the machine's addresses.
type AddressFollower struct {
	find func() ([]netip.Addr, error)
	log  *slog.Logger
	wake lifecycle.Wakeup // requests to read the addresses

	mu        sync.Mutex // guards addrs and listeners
	addrs     []netip.Addr
	listeners []*listener
}

// listener is a function that is called after changes.
type listener struct {
	name  string
	call  func([]netip.Addr) error
	known []netip.Addr // the addresses of its last successful call
}

// NewAddressFollower makes the component of a machine that has addrs at first. find reads the
// machine's addresses; it is nil where an administrator has fixed them.
func NewAddressFollower(addrs []netip.Addr, find func() ([]netip.Addr, error), log *slog.Logger) *AddressFollower {
	return &AddressFollower{find: find, log: log, wake: lifecycle.NewWakeup(), addrs: addrs}
}

// Get returns the addresses, best first. The caller must not change the list.
func (f *AddressFollower) Get() []netip.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addrs
}

// OnChange registers a listener for changes of the addresses. Listeners are called one after
// the other, in the order of their registration, and again after an error. name is for the
// log. OnChange must be called before Run.
func (f *AddressFollower) OnChange(name string, call func([]netip.Addr) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.listeners = append(f.listeners, &listener{name: name, call: call, known: f.addrs})
}

// Name implements lifecycle.Component.
func (f *AddressFollower) Name() string { return "addresses" }

// Describe implements lifecycle.Describer.
func (f *AddressFollower) Describe() string {
	text := ""
	for _, a := range f.Get() {
		text += " " + a.String()
	}
	return text[min(1, len(text)):]
}

// Run implements lifecycle.Component. It is ready at once.
func (f *AddressFollower) Run(ctx context.Context, ready func()) error {
	ready()
	if f.find == nil {
		<-ctx.Done()
		return nil
	}
	inner, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var watch sync.WaitGroup
	watch.Go(func() {
		groups := []uint32{
			unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
		}
		if err := Follow(inner, unix.NETLINK_ROUTE, groups, func([]netlink.Message) bool { return true }, f.Refresh); err != nil {
			fail(err)
		}
	})
	f.Refresh() // the machine may have moved since the addresses were first read
	f.loop(inner)
	watch.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// Refresh makes the component read the machine's addresses without a notification of the
// kernel.
func (f *AddressFollower) Refresh() {
	f.wake.Wake()
}

func (f *AddressFollower) loop(ctx context.Context) {
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-again:
		case <-f.wake:
			if !f.quiet(ctx) {
				return
			}
			f.refresh()
		}
		again = nil
		if !f.callListeners() {
			again = time.After(retryInterval)
		}
	}
}

// quiet waits until the network has been quiet for a moment, and reports whether ctx is
// still valid.
func (f *AddressFollower) quiet(ctx context.Context) bool {
	last := time.After(maxSettle)
	for {
		select {
		case <-ctx.Done():
			return false
		case <-f.wake:
		case <-time.After(settle):
			return true
		case <-last:
			return true
		}
	}
}

// refresh takes over the machine's addresses. While the machine has none, the old addresses
// stay: they may well come back.
func (f *AddressFollower) refresh() {
	found, err := f.find()
	if err != nil {
		if !errors.Is(err, ErrNoAddress) {
			f.log.Warn("cannot read the machine's addresses", "err", err)
		}
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(found) == 0 || slices.Equal(found, f.addrs) {
		return
	}
	f.log.Info("the machine's addresses have changed", "addresses", found, "before", f.addrs)
	f.addrs = found
}

// callListeners calls the listeners that do not know the latest addresses, and reports
// whether all succeeded.
func (f *AddressFollower) callListeners() bool {
	f.mu.Lock()
	addrs, all := f.addrs, f.listeners
	f.mu.Unlock()
	good := true
	for _, l := range all {
		if slices.Equal(l.known, addrs) {
			continue
		}
		if err := l.call(addrs); err != nil {
			f.log.Warn("cannot apply the machine's new addresses; trying again", "part", l.name, "err", err, "again", retryInterval)
			good = false
			continue
		}
		l.known = addrs
	}
	return good
}
