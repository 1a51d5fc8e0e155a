package nft

import (
	"fmt"

	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Comments returns the comments of a table's rules by chain, in order. It reads them from
// the kernel without the library, which parses the rules as well and cannot parse all of
// them.
func Comments(table string) (map[string][]string, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	defer conn.Close()
	filter, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(table + "\x00")}})
	if err != nil {
		return nil, err
	}
	header := []byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0} // struct nfgenmsg
	msgs, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE, Flags: netlink.Request | netlink.Dump},
		Data:   append(header, filter...),
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

// HasComments reports whether the comments of a chain's rules are these, in this order.
func (c Chain) HasComments(comments []string) bool {
	if len(c.Rules) != len(comments) {
		return false
	}
	for i, r := range c.Rules {
		if r.Comment != comments[i] {
			return false
		}
	}
	return true
}
