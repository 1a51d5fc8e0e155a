package preflight

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	mebi = 1 << 20
	gibi = 1 << 30

	leastDisk   = 256 * mebi // the store, the unpacked programs, one small image
	enoughDisk  = 2 * gibi
	refusedDisk = 32 * mebi // with less the datastore refuses writes
	evictDisk   = 15        // percent free below which the kubelet removes images and evicts pods
	evictInodes = 5         // likewise, of inodes
)

// Magic numbers of file systems that golang.org/x/sys/unix lacks.
const zfsMagic = 0x2fc12fc1

func checkDataDir(_ context.Context, c Config, p probes) []finding {
	if err := p.tryFiles(c.DataDir); err != nil {
		return fail(fmt.Sprintf("data directory %s is not writable: %v", c.DataDir, err), "make its file system writable, or choose another with --data-dir")
	}
	fs, err := p.statfs(c.DataDir)
	if err != nil {
		return fail("data directory: "+err.Error(), "choose another with --data-dir")
	}
	if fs.flags&unix.ST_NOEXEC != 0 {
		return fail(fmt.Sprintf("data directory %s is on a file system mounted noexec: container programs unpacked there cannot run", c.DataDir),
			"remount it with the option exec, or choose another with --data-dir")
	}
	var found []finding
	switch fs.kind {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		found = warn(fmt.Sprintf("data directory %s is in memory: cluster and images are lost at reboot", c.DataDir), "choose a directory on a disk with --data-dir, unless this is intended")
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		found = warn(fmt.Sprintf("data directory %s is on a network or user-space file system: locks and syncs may be unreliable", c.DataDir), "choose a directory on a local disk with --data-dir")
	}
	if fs.flags&unix.ST_NODEV != 0 {
		found = append(found, warn(fmt.Sprintf("data directory %s is on a file system mounted nodev: images with device files do not work", c.DataDir), "remount it with the option dev")...)
	}
	if found == nil {
		found = fine("%s is writable", c.DataDir)
	}
	return found
}

func checkRunDir(_ context.Context, c Config, p probes) []finding {
	if err := p.tryFiles(c.RunDir); err != nil {
		return fail(fmt.Sprintf("run directory %s is not writable: %v", c.RunDir, err), "make its file system writable, or choose another with --run-dir")
	}
	return fine("%s is writable", c.RunDir)
}

// checkOverlay accepts that layers are copied if the user has requested it. Otherwise overlayfs
// is required only by a node that already uses it.
func checkOverlay(_ context.Context, c Config, p probes) []finding {
	if c.Snapshotter == "native" {
		return fine("image layers are copied, as --snapshotter=native requires")
	}
	err := p.tryOverlay(c.DataDir)
	if err == nil {
		return fine("image layers can be stacked in %s", c.DataDir)
	}
	message, remedy := fmt.Sprintf("image layers cannot be stacked in %s: %v", c.DataDir, err), "put the data directory on ext4, xfs or btrfs with --data-dir"
	if errors.Is(err, unix.ENODEV) {
		message, remedy = "the kernel has no overlay file system", "use a kernel with CONFIG_OVERLAY_FS, or load the module overlay"
	} else if fs, statErr := p.statfs(c.DataDir); statErr == nil {
		switch fs.kind {
		case unix.OVERLAYFS_SUPER_MAGIC:
			remedy = "the directory is inside a container's own layers: mount a volume there"
		case zfsMagic:
			remedy = "update ZFS to 2.2 or later, or put the data directory on ext4, xfs or btrfs with --data-dir"
		}
	}
	if c.Snapshotter != "" {
		return fail(message, remedy+"; or leave out --snapshotter="+c.Snapshotter)
	}
	if before, err := p.readFile(c.SnapshotterFile); err == nil && strings.TrimSpace(string(before)) == "overlayfs" {
		return fail(message+", and this node's are", remedy+"; or start with --snapshotter=native")
	}
	return warn(message+": they are copied, which needs more disk and time", remedy)
}

func checkDiskSpace(_ context.Context, c Config, p probes) []finding {
	fs, err := p.statfs(c.DataDir)
	if err != nil {
		return fail("data directory: "+err.Error(), "choose another with --data-dir")
	}
	free := fmt.Sprintf("%s free of %s in %s", bytes(fs.free), bytes(fs.size), c.DataDir)
	room := "make room, or choose a larger disk with --data-dir"
	switch {
	case fs.free < leastDisk && c.Exists:
		return warn(fmt.Sprintf("only %s, less than %s: images are removed and pods evicted, and at %s the API takes no changes but deletions", free, bytes(leastDisk), bytes(refusedDisk)), room)
	case fs.free < leastDisk:
		return fail(fmt.Sprintf("only %s, less than %s", free, bytes(leastDisk)), room)
	case fs.free < enoughDisk:
		return warn(fmt.Sprintf("only %s: a few images fill that", free), room)
	case fs.free*100 < fs.size*evictDisk:
		return warn(fmt.Sprintf("only %s, less than %d %%: images will be removed and pods evicted", free, evictDisk), room)
	case fs.inodes > 0 && fs.avail*100 < fs.inodes*evictInodes:
		return warn(fmt.Sprintf("only %d of %d inodes are free in %s: pods will be evicted", fs.avail, fs.inodes, c.DataDir), "remove small files, or choose another file system with --data-dir")
	}
	return fine("%s", free)
}

// The memory that kedge needs in a control group of its own, by trial: it starts slowly with the
// least; with less the kernel kills it, or it does not become ready (docs/performance.md). A
// whole machine needs more, for its kernel and other programs.
const (
	leastMemory       = 128 * mebi
	leastMemoryNoNode = 96 * mebi
	machinesOwn       = 48 * mebi
	enoughMemory      = 512 * mebi
)

func checkMemory(_ context.Context, c Config, p probes) []finding {
	least := uint64(leastMemory)
	if c.NoNode {
		least = leastMemoryNoNode
	}
	least += machinesOwn
	text, err := p.readFile("/proc/meminfo")
	if err != nil {
		return fail("memory is unknown: "+err.Error(), "mount /proc")
	}
	total, ok := memTotal(string(text))
	have, where := total, "this machine"
	if limit, limited := p.memoryLimit(); limited && uint64(limit) < total {
		have, where = uint64(limit), "the control group of this process"
		least -= machinesOwn
	}
	switch {
	case !ok:
		return warn("memory is unknown: /proc/meminfo has no MemTotal", "")
	case have < least:
		return fail(fmt.Sprintf("%s has only %s of memory, and kedge needs %s", where, bytes(have), bytes(least)), "give it more")
	case have < enoughMemory:
		return warn(fmt.Sprintf("%s has only %s of memory: there is little left for pods", where, bytes(have)), "switch off parts with --disable, or run only an agent here")
	}
	return fine("%s of memory", bytes(have))
}

func memTotal(meminfo string) (uint64, bool) {
	var kib uint64
	for line := range strings.Lines(meminfo) {
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kib); err == nil {
			return kib << 10, true
		}
	}
	return 0, false
}

func checkSwap(_ context.Context, _ Config, p probes) []finding {
	text, err := p.readFile("/proc/swaps")
	if err != nil || strings.Count(string(text), "\n") < 2 {
		return fine("no swap")
	}
	return fine("swap is on: pods do not use it by default, but slow down when kedge itself is swapped")
}

func bytes(n uint64) string {
	switch {
	case n >= 10*gibi:
		return fmt.Sprintf("%d GiB", n/gibi)
	case n >= gibi:
		return fmt.Sprintf("%.1f GiB", float64(n)/gibi)
	}
	return fmt.Sprintf("%d MiB", n/mebi)
}
