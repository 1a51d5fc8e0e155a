package doctor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The request of the kernel's older packet filter, from linux/netfilter_ipv4/ip_tables.h.
const (
	getInfo    = 64 // IPT_SO_GET_INFO
	getEntries = 65 // IPT_SO_GET_ENTRIES

	infoSize    = 84 // struct ipt_getinfo: name, valid hooks, five entries, five underflows, number of entries, their size
	nameSize    = 32 // XT_TABLE_MAXNAMELEN
	entriesHead = 40 // struct ipt_get_entries before the entries: name, size, and padding
	entrySize   = 112
	nextOffset  = 90 // of next_offset in struct ipt_entry
	targetHead  = 32 // struct xt_entry_target before the verdict
	dropVerdict = -1 // -NF_DROP - 1
)

// Hooks of the filter table.
var legacyHooks = []struct {
	name   string
	number int
}{{"INPUT", 1}, {"FORWARD", 2}}

// readLegacy reads the built-in chains of iptables-legacy. It does not load the kernel's module: rules exist only if it
// is loaded.
func readLegacy() ([]legacyChain, error) {
	names, err := os.ReadFile("/proc/net/ip_tables_names")
	if errors.Is(err, fs.ErrNotExist) || err == nil && !slices.Contains(strings.Fields(string(names)), "filter") {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("read the rules of iptables-legacy: %w", err)
	}
	defer unix.Close(fd)
	info := make([]byte, infoSize)
	copy(info, "filter")
	if err := getsockopt(fd, getInfo, info); err != nil {
		return nil, fmt.Errorf("read the rules of iptables-legacy: %w", err)
	}
	length := binary.NativeEndian.Uint32(info[infoSize-4:])
	entries := make([]byte, entriesHead+int(length))
	copy(entries, "filter")
	binary.NativeEndian.PutUint32(entries[nameSize:], length)
	if err := getsockopt(fd, getEntries, entries); err != nil {
		return nil, fmt.Errorf("read the rules of iptables-legacy: %w", err)
	}
	return parseLegacy(info, entries[entriesHead:])
}

func getsockopt(fd, option int, buffer []byte) error {
	length := uint32(len(buffer))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, uintptr(option),
		uintptr(unsafe.Pointer(unsafe.SliceData(buffer))), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// parseLegacy returns the chains in the answers of the kernel.
func parseLegacy(info, entries []byte) (chains []legacyChain, err error) {
	if len(info) < infoSize {
		return nil, errors.New("the kernel's answer about iptables-legacy is too short")
	}
	for _, hook := range legacyHooks {
		begin := binary.NativeEndian.Uint32(info[36+4*hook.number:])
		policy := binary.NativeEndian.Uint32(info[56+4*hook.number:])
		if int(policy)+entrySize+targetHead+4 > len(entries) {
			return nil, errors.New("the kernel's answer about iptables-legacy is too short")
		}
		c := legacyChain{name: hook.name, drops: int32(binary.NativeEndian.Uint32(entries[policy+entrySize+targetHead:])) == dropVerdict}
		for at := begin; at < policy; c.rules++ {
			next := binary.NativeEndian.Uint16(entries[at+nextOffset:])
			if next == 0 {
				return nil, errors.New("the kernel's answer about iptables-legacy cannot be read")
			}
			at += uint32(next)
		}
		chains = append(chains, c)
	}
	return chains, nil
}
