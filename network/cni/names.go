package cni

import (
	"crypto/sha256"
	"encoding/base32"
	"net"
	"strings"
)

// LinkTag is the prefix of the names of host interfaces of all nodes.
const LinkTag = "kdg"

// The name of a host interface is LinkTag, 4 characters for the node, and 8 for the
// attachment: the 15 characters that the kernel allows.
const (
	nodeChars = 4
	podChars  = 8
)

// base32Lower has no characters that need care in interface names or patterns.
var base32Lower = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// LinkPrefix returns the prefix of the names of the host interfaces of a node's pods. It
// depends only on the node's name, and differs between nodes on one machine.
func LinkPrefix(node string) string { return LinkTag + digest("node/" + node)[:nodeChars] }

// linkName returns the name of the host interface of an attachment.
func linkName(prefix, owner string) string { return prefix + digest("pod/" + owner)[:podChars] }

// hardwareAddr derives a locally administered address. A fixed address keeps udev from
// replacing it after the neighbour entries are written.
func hardwareAddr(seed string) net.HardwareAddr {
	sum := sha256.Sum256([]byte("mac/" + seed))
	mac := net.HardwareAddr(sum[:6])
	mac[0] = mac[0]&^1 | 2
	return mac
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base32Lower.EncodeToString(sum[:])
}

// owner returns the name of an attachment in the ledger.
func owner(containerID, ifName string) string { return containerID + "/" + ifName }

func splitOwner(owner string) (containerID, ifName string) {
	containerID, ifName, _ = strings.Cut(owner, "/")
	return containerID, ifName
}

// The alias of a host interface is the full text of which its name is a hash.
const aliasTag = "kedge "

func alias(node, owner string) string { return aliasTag + node + " " + owner }

// parseAlias returns the owner in an alias, if the alias belongs to the node.
func parseAlias(node, alias string) (owner string, ok bool) {
	rest, ok := strings.CutPrefix(alias, aliasTag+node+" ")
	return rest, ok && rest != ""
}
