package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftaGenProcPID is the attribute of a generation message that names who made
// the change: a thread, not a process.
const nftaGenProcPID = 2

// Watch calls changed after another process has changed any rules, until ctx is
// cancelled. Changes in quick succession are reported once. It returns early
// only when the kernel's messages cannot be received.
func Watch(ctx context.Context, changed func()) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	defer conn.Close()
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	// A deadline in the past ends the receive that is under way.
	stop := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for {
		msgs, err := conn.Receive()
		if ctx.Err() != nil {
			return nil
		}
		switch {
		case errors.Is(err, unix.ENOBUFS): // messages were lost, so look
			changed()
		case err != nil:
			return fmt.Errorf("watch nftables: %w", err)
		case foreign(msgs, ownThread):
			changed()
		}
	}
}

// foreign says whether a transaction of another process ends in msgs. The
// kernel sends one such message after the details of each transaction.
func foreign(msgs []netlink.Message, own func(tid uint32) bool) bool {
	const newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
	for _, m := range msgs {
		if m.Header.Type != newGeneration || len(m.Data) < 4 {
			continue
		}
		attrs, err := netlink.NewAttributeDecoder(m.Data[4:]) // after struct nfgenmsg
		if err != nil {
			return true
		}
		attrs.ByteOrder = binary.BigEndian
		tid := uint32(0)
		for attrs.Next() {
			if attrs.Type() == nftaGenProcPID {
				tid = attrs.Uint32()
			}
		}
		if !own(tid) {
			return true
		}
	}
	return false
}

// ownThread says whether a thread is of this process. One that has ended since,
// or is numbered differently inside a process namespace, is taken for another's,
// which costs one look at the rules.
func ownThread(tid uint32) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid))
	return err == nil
}
