package nft

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
)

// nftaGenProcPID is the attribute of a generation message with the thread (not the process)
// that made the change.
const nftaGenProcPID = 2

// Watch calls changed after another process has changed one of kedge's tables, until ctx is
// cancelled. Changes in quick succession are reported once. It returns early only when the
// kernel's messages cannot be received.
func Watch(ctx context.Context, changed func()) error {
	var t observedTransaction
	foreign := func(msgs []netlink.Message) bool { return t.foreign(msgs, ownThread) }
	if err := kernelnet.Follow(ctx, unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}, foreign, changed); err != nil {
		return fmt.Errorf("watch nftables: %w", err)
	}
	return nil
}

// observedTransaction is the part of a transaction that has been received so far.
type observedTransaction struct {
	ours bool // it changes a table of kedge's
}

// foreign reports whether msgs contain the end of a transaction in which another process
// changed kedge's tables. The kernel sends the details of a transaction, then one message
// that names the process.
func (t *observedTransaction) foreign(msgs []netlink.Message, own func(tid uint32) bool) bool {
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

// ownThread reports whether a thread belongs to this process. A thread that has ended, or
// has another number inside a process namespace, counts as foreign, which costs one
// comparison of the rules.
func ownThread(tid uint32) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid))
	return err == nil
}
