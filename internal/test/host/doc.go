// Package host gives tests networks of their own: [Isolate] continues a test program in
// namespaces of its own, [RequireRoot] and [RequireIsolation] skip a test with a reason,
// [LAN] and [Host] are names for those of throwaway/lan, and [Cable] makes the cable of a host
// bad. Cables that are pulled are those of throwaway/lan.
//
// Only tests and scripts may import it.
package host
