// Package preflight checks before kedge starts whether this machine lacks kernel features,
// limits, permissions, disk space or free ports. Each finding has a sentence about the problem
// and one about its remedy.
//
// Features are tried and not looked up: a kernel's configuration shows what the kernel could
// do, and a trial shows what it does here, in this container, under this security profile and
// on this file system. Trials run in namespaces of their own, which the kernel removes even if
// the process dies, and leave nothing behind.
//
// [WaitForClock] delays the start while the clock cannot be right.
//
// The package changes and repairs nothing on the machine. It serves the command kedge check
// and, by [Required], the start of every node. Packages command and assembly, and main,
// may import it.
package preflight
