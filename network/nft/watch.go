package nft

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/netwatch"
)

// nftaGenProcPID is the attribute of a generation message that names who made
// the change: a thread, not a process.
const nftaGenProcPID = 2

// Watch calls changed after another process has changed any of kedge's tables, until
// ctx is cancelled. Changes in quick succession are reported once. It returns early
// only when the kernel's messages cannot be received.
func Watch(ctx context.Context, changed func()) error {
	var t heard
	foreign := func(msgs []netlink.Message) bool { return t.foreign(msgs, ownThread) }
	if err := netwatch.Follow(ctx, unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, foreign, changed); err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	return nil
}

// heard is what was received of a transaction so far.
type heard struct {
	ours bool // it changes a table of kedge's
}

// foreign says whether a transaction of another process that changes our tables
// ends in msgs. The kernel sends the details of each, then one message that names
// the process.
func (t *heard) foreign(msgs []netlink.Message, own func(tid uint32) bool) bool {
	const (
		newGeneration = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
		nameOfTable   = 1 // NFTA_TABLE_NAME, NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE ...
	)
	found := false
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		attrs, err := netlink.NewAttributeDecoder(m.Data[4:]) // after struct nfgenmsg
		if err != nil {
			return true
		}
		attrs.ByteOrder = binary.BigEndian
		tid := uint32(0)
		for attrs.Next() {
			switch {
			case m.Header.Type == newGeneration && attrs.Type() == nftaGenProcPID:
				tid = attrs.Uint32()
			case m.Header.Type != newGeneration && attrs.Type() == nameOfTable:
				t.ours = t.ours || strings.HasPrefix(attrs.String(), anyTablePrefix)
			}
		}
		if m.Header.Type == newGeneration {
			found = found || t.ours && !own(tid)
			t.ours = false
		}
	}
	return found
}

// ownThread says whether a thread is of this process. One that has ended since,
// or is numbered differently inside a process namespace, is taken for another's,
// which costs one look at the rules.
func ownThread(tid uint32) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid))
	return err == nil
}
