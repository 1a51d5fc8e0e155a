package nft

import (
	"fmt"

	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// comments returns the comments of a table's rules by chain, in order. It asks
// the kernel itself: the library parses the rules too, and cannot read all.
func comments(table string) (map[string][]string, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	defer conn.Close()
	ask, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(table + "\x00")}})
	if err != nil {
		return nil, err
	}
	header := []byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0} // struct nfgenmsg
	msgs, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   append(header, ask...),
	})
	if err != nil {
		return nil, fmt.Errorf("list rules of nftables table %s: %w", table, err)
	}
	out := map[string][]string{}
	for _, m := range msgs {
		attrs, err := netlink.NewAttributeDecoder(m.Data[len(header):])
		if err != nil {
			return nil, fmt.Errorf("read a rule of nftables table %s: %w", table, err)
		}
		var in, chain, comment string
		for attrs.Next() {
			switch attrs.Type() {
			case unix.NFTA_RULE_TABLE:
				in = attrs.String()
			case unix.NFTA_RULE_CHAIN:
				chain = attrs.String()
			case unix.NFTA_RULE_USERDATA:
				comment, _ = userdata.GetString(attrs.Bytes(), userdata.TypeComment)
			}
		}
		if in == table {
			out[chain] = append(out[chain], comment)
		}
	}
	return out, nil
}

// has says whether a chain's rules have the comments, in this order.
func (c chain) has(comments []string) bool {
	if len(c.rules) != len(comments) {
		return false
	}
	for i, r := range c.rules {
		if r.comment != comments[i] {
			return false
		}
	}
	return true
}
