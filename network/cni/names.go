package cni

import (
	"crypto/sha256"
	"encoding/base32"
	"net"
	"strings"
)

// LinkTag is how the names of all nodes' host interfaces begin.
const LinkTag = "kdg"

// Host interfaces are called LinkTag, 4 characters for the node, 8 for the
// attachment: the 15 that the kernel allows.
const (
	nodeChars = 4
	podChars  = 8
)

// base32Lower has no characters that need care in interface names or patterns.
var base32Lower = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

// LinkPrefix is how the names of the host interfaces of a node's pods begin.
// It depends on the node's name only, and differs between nodes of one machine.
func LinkPrefix(node string) string { return LinkTag + digest("node/" + node)[:nodeChars] }

// linkName names the host interface of one attachment.
func linkName(prefix, owner string) string { return prefix + digest("pod/" + owner)[:podChars] }

// hardwareAddr derives a locally administered address. Choosing it ourselves
// keeps udev from replacing it after the neighbour entries are written.
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

// owner is the name under which ipam keeps an attachment.
func owner(containerID, ifName string) string { return containerID + "/" + ifName }

func splitOwner(owner string) (containerID, ifName string) {
	containerID, ifName, _ = strings.Cut(owner, "/")
	return containerID, ifName
}

// The alias of a host interface says in full what its name only hints at.
const aliasTag = "kedge "

func alias(node, owner string) string { return aliasTag + node + " " + owner }

// parseAlias returns the owner that an alias names, if it is one of the node's.
func parseAlias(node, alias string) (owner string, ok bool) {
	rest, ok := strings.CutPrefix(alias, aliasTag+node+" ")
	return rest, ok && rest != ""
}
