package kernelnet

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Watch receives notifications from the moment when it is opened.
type Watch struct{ conn *netlink.Conn }

// Open joins groups of a netlink protocol, such as unix.RTNLGRP_LINK of
// unix.NETLINK_ROUTE, in the network namespace of the calling thread. The caller
// closes the watch.
func Open(protocol int, groups ...uint32) (*Watch, error) {
	conn, err := netlink.Dial(protocol, nil)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	for _, group := range groups {
		if err := conn.JoinGroup(group); err != nil {
			return nil, errors.Join(fmt.Errorf("join netlink group %d: %w", group, err), conn.Close())
		}
	}
	return &Watch{conn}, nil
}

// Close ends the watch. Follow must not be called afterwards.
func (w *Watch) Close() error { return w.conn.Close() }

// Follow calls changed after messages for which concerns returns true, and when messages
// were lost, until ctx is cancelled; then it returns nil. The error says why no more
// messages can be received.
func (w *Watch) Follow(ctx context.Context, concerns func([]netlink.Message) bool, changed func()) error {
	// A deadline in the past ends the receive that is under way.
	stop := context.AfterFunc(ctx, func() { _ = w.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		msgs, err := w.conn.Receive()
		if ctx.Err() != nil {
			return nil
		}
		switch {
		case errors.Is(err, unix.ENOBUFS):
			changed()
		case err != nil:
			return fmt.Errorf("receive netlink events: %w", err)
		case concerns(msgs):
			changed()
		}
	}
}

// Follow opens a watch, follows it, and closes it.
func Follow(ctx context.Context, protocol int, groups []uint32, concerns func([]netlink.Message) bool, changed func()) error {
	w, err := Open(protocol, groups...)
	if err != nil {
		return err
	}
	defer w.Close()
	return w.Follow(ctx, concerns, changed)
}
