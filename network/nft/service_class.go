package nft

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"strings"
	"time"
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

// action is the kind of a class. The values are in kernels: they must not change
// their meaning.
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

// bytes is the class as the value of a map: five numbers in the machine's order.
func (c class) bytes() string {
	b := make([]byte, 0, 20)
	for _, n := range []uint32{uint32(c.do), c.cluster, c.local, c.sticky, c.turn} {
		b = binary.NativeEndian.AppendUint32(b, n)
	}
	return string(b)
}

func parseClass(b string) class {
	n := func(i int) uint32 { return parseNumber(b[4*i : 4*i+4]) }
	return class{do: action(n(0)), cluster: n(1), local: n(2), sticky: n(3), turn: n(4)}
}

// chain names the chain of the class, as in "external-local.c3.l1-4": three
// endpoints anywhere, one of them here, IPv4.
func (c class) chain(f family) string {
	var b strings.Builder
	b.WriteString(c.do.String())
	for _, part := range []struct {
		letter byte
		n      uint32
	}{{'c', c.cluster}, {'l', c.local}, {'s', c.sticky}} {
		if part.n > 0 {
			fmt.Fprintf(&b, ".%c%d", part.letter, part.n)
		}
	}
	if c.turn != 0 {
		fmt.Fprintf(&b, ".%08x", c.turn)
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

// turn numbers the port's counter. Two ports with the same number and as many
// endpoints take turns together, which does no harm.
func (p *ServicePort) turn() uint32 {
	h := fnv.New32a()
	h.Write(p.ClusterIP.AsSlice())
	h.Write([]byte{p.Protocol, byte(p.Port >> 8), byte(p.Port)})
	return max(1, h.Sum32())
}
