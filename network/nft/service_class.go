package nft

import (
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// class says what happens to connections to a frontend. All frontends of the same
// class share one chain, so the number of chains does not depend on the number
// of services but on how much they differ.
type class struct {
	do      action
	cluster uint32 // how many endpoints traffic to any node has
	local   uint32 // how many endpoints traffic that stays on this node has
	sticky  uint32 // seconds
	turn    uint32 // which counter of RoundRobin is used; 0 with other schedulers
}

// action is the kind of a class.
type action uint32

const (
	actReject action = 1 + iota
	actDrop
	actInternal      // cluster IP, to any node
	actInternalLocal // cluster IP, to this node
	actExternal      // another address, to any node
	actExternalLocal // another address, to this node unless it comes from here
	actNodePort      // node port, to any node
	actNodePortLocal // node port, to this node unless it comes from here

	// actRestricted is added where only some sources are allowed.
	actRestricted action = 0x100
)

func (a action) String() string {
	names := []string{"", "reject", "drop", "internal", "internal-local", "external", "external-local", "node-port", "node-port-local"}
	name := names[a&^actRestricted]
	if a&actRestricted != 0 {
		name += "-restricted"
	}
	return name
}

func (c class) isExternalLocal() bool {
	do := c.do &^ actRestricted
	return do == actExternalLocal || do == actNodePortLocal
}

// key is the class as the value of a map, in the 16 bytes of an interface's name:
// the nft program prints it, and one number for each part it could not print.
func (c class) key() string {
	name := fmt.Sprintf("%x", uint32(c.do))
	for _, part := range c.parts() {
		name += string(part.letter) + strconv.FormatUint(uint64(part.n), 36)
	}
	if c.turn != 0 {
		name += "t" + strconv.FormatUint(uint64(c.turn), 36)
	}
	if len(name) > classKeyLen-1 { // many thousands of endpoints
		sum := sha256.Sum256([]byte(name))
		name = "#" + base64.RawStdEncoding.EncodeToString(sum[:])[:classKeyLen-2]
	}
	return name + strings.Repeat("\x00", classKeyLen-len(name))
}

const classKeyLen = unix.IFNAMSIZ

type classPart struct {
	letter byte
	n      uint32
}

// parts are the numbers of a class that are not zero.
func (c class) parts() []classPart {
	all := []classPart{{'c', c.cluster}, {'l', c.local}, {'s', c.sticky}}
	return slices.DeleteFunc(all, func(p classPart) bool { return p.n == 0 })
}

// chain names the chain of the class, as in "external-local.c3.l1-4": three
// endpoints anywhere, one of them here, IPv4.
func (c class) chain(f family) string {
	var b strings.Builder
	b.WriteString(c.do.String())
	for _, part := range c.parts() {
		fmt.Fprintf(&b, ".%c%d", part.letter, part.n)
	}
	if c.turn != 0 {
		fmt.Fprintf(&b, ".t%d", c.turn)
	}
	return b.String() + "-" + f.suffix
}

// classes says what happens at the port's cluster IP, its other addresses and
// its node port.
func (p *ServicePort) classes(s Scheduler) (internal, external, nodePort class) {
	if !p.Ready {
		c := class{do: actReject}
		return c, c, c
	}
	common := class{sticky: uint32(p.StickyFor / time.Second)}
	if s == RoundRobin {
		common.turn = p.turn()
	}
	internal = common
	if p.InternalLocal {
		internal.do, internal.local = actInternalLocal, uint32(len(p.Local))
	} else {
		internal.do, internal.cluster = actInternal, uint32(len(p.Cluster))
	}
	if internal.cluster+internal.local == 0 {
		internal = class{do: actDrop}
	}
	external = common
	external.do, external.cluster = actExternal, uint32(len(p.Cluster))
	if p.ExternalLocal {
		external.do, external.local = actExternalLocal, uint32(len(p.Local))
	}
	if external.cluster+external.local == 0 {
		external = class{do: actDrop}
		return internal, external, external
	}
	nodePort = external
	nodePort.do += actNodePort - actExternal
	return internal, external, nodePort
}

// turns is how many counters there are for each number of endpoints.
const turns = 1 << 15

// turn numbers the port's counter. Two ports with the same number and as many
// endpoints take turns together, which does no harm.
func (p *ServicePort) turn() uint32 {
	h := fnv.New32a()
	h.Write(p.ClusterIP.AsSlice())
	h.Write([]byte{p.Protocol, byte(p.Port >> 8), byte(p.Port)})
	return 1 + h.Sum32()%turns
}
