// Package kernelnet has what kedge asks the kernel about networks, in the namespace of the calling
// thread. A [Watch] receives notifications of interfaces, addresses, routes and packet filters by
// netlink(7); [WaitCarrier] and [WaitLocal] wait until the kernel has finished with an interface
// that was just configured; [List] reads a list that changes meanwhile; [FindAddresses] finds the addresses by which the machine is reached
// when its administrator has not named them, and an [AddressFollower] follows them when they
// change.
//
// It configures nothing, sends no packet, and does not know who uses the answers: callers decide
// which notifications concern them. Any package may import it.
package kernelnet
