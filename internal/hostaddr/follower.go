package hostaddr

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/netwatch"
)

const (
	// settle is how long nothing may have changed before the machine is looked at: a
	// machine that is carried to another network loses an address, and its routes, before
	// it has others.
	settle = time.Second
	// settleAtMost bounds that, where something changes all the time.
	settleAtMost = 5 * time.Second
	// tellAgain is how long somebody who could not follow is left alone.
	tellAgain = 5 * time.Second
)

// Follower is the component that knows the addresses of the machine while they change.
type Follower struct {
	find func() ([]netip.Addr, error)
	log  *slog.Logger
	wake chan struct{} // asks for a look; holds one request

	mu        sync.Mutex // guards what follows, and what the pointers lead to
	addrs     []netip.Addr
	followers []*follower
}

// follower is somebody who is told.
type follower struct {
	what string
	tell func([]netip.Addr) error
	told []netip.Addr
}

// NewFollower makes the component of a machine that has addrs at first. find says which
// it has; nil where an administrator has fixed them: then nothing ever changes.
func NewFollower(addrs []netip.Addr, find func() ([]netip.Addr, error), log *slog.Logger) *Follower {
	return &Follower{find: find, log: log, wake: make(chan struct{}, 1), addrs: addrs}
}

// Get returns the addresses, best first. The caller must not change the list.
func (f *Follower) Get() []netip.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.addrs
}

// Tell has somebody told of the addresses after each change, one after the other, in the
// order of the calls of Tell, and again while it returns an error. what is for the log.
// It must be called before Run.
func (f *Follower) Tell(what string, tell func([]netip.Addr) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.followers = append(f.followers, &follower{what: what, tell: tell, told: f.addrs})
}

// Name implements lifecycle.Component.
func (f *Follower) Name() string { return "addresses" }

// Describe implements lifecycle.Describer.
func (f *Follower) Describe() string {
	text := ""
	for _, a := range f.Get() {
		text += " " + a.String()
	}
	return text[min(1, len(text)):]
}

// Run implements lifecycle.Component. It is ready at once.
func (f *Follower) Run(ctx context.Context, ready func()) error {
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
		if err := netwatch.Follow(inner, unix.NETLINK_ROUTE, groups, func([]netlink.Message) bool { return true }, f.Look); err != nil {
			fail(err)
		}
	})
	f.Look() // it may have moved since it was looked at first
	f.loop(inner)
	watch.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// Look asks for a look at the machine, also when the kernel has said nothing.
func (f *Follower) Look() {
	select {
	case f.wake <- struct{}{}:
	default: // asked for already
	}
}

func (f *Follower) loop(ctx context.Context) {
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
			f.look()
		}
		again = nil
		if !f.tellAll() {
			again = time.After(tellAgain)
		}
	}
}

// quiet waits until nothing has changed for a moment, and says whether ctx is valid.
func (f *Follower) quiet(ctx context.Context) bool {
	last := time.After(settleAtMost)
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

// look takes over what the machine has. While it has nothing the old addresses stay: the
// next ones are as likely to be the same.
func (f *Follower) look() {
	found, err := f.find()
	if err != nil {
		if !errors.Is(err, ErrNone) {
			f.log.Warn("the machine's addresses cannot be read", "err", err)
		}
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(found) == 0 || slices.Equal(found, f.addrs) {
		return
	}
	f.log.Info("this machine has other addresses", "addresses", found, "before", f.addrs)
	f.addrs = found
}

// tellAll tells those who do not know the latest, and says whether all could follow.
func (f *Follower) tellAll() bool {
	f.mu.Lock()
	addrs, all := f.addrs, f.followers
	f.mu.Unlock()
	good := true
	for _, one := range all {
		if slices.Equal(one.told, addrs) {
			continue
		}
		if err := one.tell(addrs); err != nil {
			f.log.Warn("a part does not know of this machine's addresses yet", "part", one.what, "err", err, "again", tellAgain)
			good = false
			continue
		}
		one.told = addrs
	}
	return good
}
