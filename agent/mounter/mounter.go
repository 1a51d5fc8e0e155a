// Package mounter is the kubelet's mount interface, implemented with system calls
// instead of mount(8) and umount(8).
//
// It is not for containers: runc mounts those. Only package agent imports it.
package mounter

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/mount-utils"
)

// Mounter implements the kubelet's mount interface with system calls. It inherits upstream's listing and
// checking of mount points, which read /proc, and replaces mounting, for which upstream runs mount(8) and
// umount(8).
//
// For NFS it does the work of mount.nfs. Other file systems with a mount(8) helper (cifs, ceph) work if the
// kernel itself understands the options.
type Mounter struct{ mount.Mounter }

var _ mount.MounterForceUnmounter = (*Mounter)(nil)

// mountFlags maps options of mount(8) to flags of mount(2). Negative options clear the flag.
var mountFlags = map[string]struct {
	clear bool
	flag  uintptr
}{
	"async": {true, unix.MS_SYNCHRONOUS}, "atime": {true, unix.MS_NOATIME}, "bind": {false, unix.MS_BIND},
	"defaults": {}, "dev": {true, unix.MS_NODEV}, "diratime": {true, unix.MS_NODIRATIME},
	"dirsync": {false, unix.MS_DIRSYNC}, "exec": {true, unix.MS_NOEXEC}, "lazytime": {false, unix.MS_LAZYTIME},
	"mand": {false, unix.MS_MANDLOCK}, "noatime": {false, unix.MS_NOATIME}, "nodev": {false, unix.MS_NODEV},
	"nodiratime": {false, unix.MS_NODIRATIME}, "noexec": {false, unix.MS_NOEXEC}, "nomand": {true, unix.MS_MANDLOCK},
	"norelatime": {true, unix.MS_RELATIME}, "nostrictatime": {true, unix.MS_STRICTATIME}, "nosuid": {false, unix.MS_NOSUID},
	"rbind": {false, unix.MS_BIND | unix.MS_REC}, "relatime": {false, unix.MS_RELATIME}, "remount": {false, unix.MS_REMOUNT},
	"ro": {false, unix.MS_RDONLY}, "rw": {true, unix.MS_RDONLY}, "strictatime": {false, unix.MS_STRICTATIME},
	"suid": {true, unix.MS_NOSUID}, "sync": {false, unix.MS_SYNCHRONOUS},
}

// ignoredOptions have a meaning for mount(8) only.
var ignoredOptions = map[string]bool{"auto": true, "noauto": true, "user": true, "nouser": true, "_netdev": true, "nofail": true}

// propagation are the options that need a separate system call.
var propagation = map[string]uintptr{
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC,
	"shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC,
	"slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC,
	"unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

// mountOptions is a list of options, split by the way in which they are passed to mount(2).
type mountOptions struct {
	flags     uintptr
	propagate []uintptr
	data      string // for the filesystem
}

func parseMountOptions(options []string) mountOptions {
	var o mountOptions
	var data []string
	for _, list := range options {
		for opt := range strings.SplitSeq(list, ",") {
			opt = strings.TrimSpace(opt)
			if f, ok := mountFlags[opt]; ok {
				if f.clear {
					o.flags &^= f.flag
				} else {
					o.flags |= f.flag
				}
				continue
			}
			if p, ok := propagation[opt]; ok {
				o.propagate = append(o.propagate, p)
				continue
			}
			if opt != "" && !ignoredOptions[opt] {
				data = append(data, opt)
			}
		}
	}
	o.data = strings.Join(data, ",")
	return o
}

// Mount implements mount.Interface.
func (m *Mounter) Mount(source, target, fstype string, options []string) error {
	return m.MountSensitive(source, target, fstype, options, nil)
}

// MountSensitive implements mount.Interface. Errors never contain sensitiveOptions.
func (m *Mounter) MountSensitive(source, target, fstype string, options, sensitiveOptions []string) error {
	o := parseMountOptions(append(append([]string(nil), options...), sensitiveOptions...))
	if o.flags&unix.MS_BIND != 0 && o.flags&unix.MS_REMOUNT == 0 {
		return m.bind(source, target, o)
	}
	if fstype == "" && o.flags&unix.MS_REMOUNT == 0 {
		return fmt.Errorf("mount %s at %s: the filesystem type is missing", source, target)
	}
	call := func(data string) error { return unix.Mount(source, target, fstype, o.flags, data) }
	var err error
	if isNFS(fstype) && o.flags&unix.MS_REMOUNT == 0 {
		err = mountNFS(source, fstype, o, call)
	} else {
		err = call(o.data)
	}
	if err != nil {
		return fmt.Errorf("mount %s at %s (%s, %s): %w", source, target, fstype, strings.Join(options, ","), err)
	}
	return propagate(target, o.propagate)
}

// MountSensitiveWithoutSystemd implements mount.Interface.
func (m *Mounter) MountSensitiveWithoutSystemd(source, target, fstype string, options, sensitiveOptions []string) error {
	return m.MountSensitive(source, target, fstype, options, sensitiveOptions)
}

// MountSensitiveWithoutSystemdWithMountFlags implements mount.Interface. Arguments of mount(8) in flags have no
// counterpart in mount(2), except --no-canonicalize, which is the behaviour of the system call.
func (m *Mounter) MountSensitiveWithoutSystemdWithMountFlags(source, target, fstype string, options, sensitiveOptions, flags []string) error {
	for _, f := range flags {
		if f != "--no-canonicalize" {
			return fmt.Errorf("mount %s at %s: %q is not supported without mount(8)", source, target, f)
		}
	}
	return m.MountSensitive(source, target, fstype, options, sensitiveOptions)
}

// lockedFlags are the flags that a bind mount must inherit from its source: without them the kernel would
// refuse the remount, or silently drop a restriction.
const lockedFlags = unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOSUID | unix.MS_NOATIME | unix.MS_NODIRATIME | unix.MS_RELATIME | unix.MS_RDONLY

// bind creates a bind mount, and sets its flags in a second call, because the first call ignores them.
func (m *Mounter) bind(source, target string, o mountOptions) error {
	recursive := o.flags & unix.MS_REC
	if err := unix.Mount(source, target, "", unix.MS_BIND|recursive, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", source, target, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(source, &st); err != nil {
		return errors.Join(fmt.Errorf("bind %s to %s: %w", source, target, err), unix.Unmount(target, unix.MNT_DETACH))
	}
	flags := o.flags&^(unix.MS_BIND|unix.MS_REC) | uintptr(st.Flags)&lockedFlags
	if flags != 0 {
		if err := unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
			return errors.Join(fmt.Errorf("bind %s to %s with its flags: %w", source, target, err), unix.Unmount(target, unix.MNT_DETACH))
		}
	}
	return propagate(target, o.propagate)
}

func propagate(target string, flags []uintptr) error {
	for _, f := range flags {
		if err := unix.Mount("", target, "", f, ""); err != nil {
			return fmt.Errorf("change the propagation of %s: %w", target, err)
		}
	}
	return nil
}

// Unmount implements mount.Interface. A target that is not a mount point, or does not exist, is not an error.
func (m *Mounter) Unmount(target string) error {
	err := unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
	if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("unmount %s: %w", target, err)
}

// UnmountWithForce implements mount.MounterForceUnmounter.
func (m *Mounter) UnmountWithForce(target string, timeout time.Duration) error {
	done := make(chan error, 1)
	go func() { done <- m.Unmount(target) }()
	select {
	case err := <-done:
		if err == nil {
			return nil
		}
	case <-time.After(timeout):
	}
	if err := unix.Unmount(target, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s by force: %w", target, err)
	}
	return nil
}

// CanSafelySkipMountPointCheck implements mount.Interface: Unmount handles targets that are not mount points.
func (m *Mounter) CanSafelySkipMountPointCheck() bool { return true }
