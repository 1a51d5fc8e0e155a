// Package blockrecorder is a disk whose writes and flushes are recorded, so that tests can make every state in which a power cut
// may leave it.
//
// The disk is one file of a FUSE file system in this process, with a loop device on it. The kernel sends each flush of the
// device as an fsync of the file, so that writes and flushes come in one order. A state after a power cut has everything that was
// written before a flush, and any part of what came after it: see [Recording.Image].
//
// The process must not use the disk's file system itself: a page fault would wait for a goroutine that cannot run. Only tests of
// the datastore import the package. They need root, /dev/fuse and loop devices: see [Missing].
package blockrecorder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const diskName = "disk"

// Missing says what this machine lacks for a recorded disk; empty if nothing.
func Missing() string {
	if os.Geteuid() != 0 {
		return "root"
	}
	for _, device := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(device); err != nil {
			return device
		}
	}
	for _, program := range []string{"losetup", "mkfs.ext4"} {
		if _, err := exec.LookPath(program); err != nil {
			return "the program " + program
		}
	}
	return ""
}

// Disk is a block device that is recorded.
type Disk struct {
	Device string // path, such as /dev/loop3
	// CounterFile has the number of flushes so far, which another process reads with [OpenCounter].
	CounterFile string

	server  *fuse.Server
	counter *Counter

	mu       sync.Mutex // guards the fields below
	content  []byte
	rec      Recording
	failNext bool                 // the next flush fails
	failData bool                 // the next write fails
	delay    func() time.Duration // of each flush; nil for none
	stalled  chan struct{}        // closed when the disk goes on; nil while it does
}

// New makes a disk in dir with the given content, whose length is its size in bytes. The content is the disk's from now on.
func New(dir string, content []byte) (_ *Disk, err error) {
	d := &Disk{CounterFile: filepath.Join(dir, "flushes"), content: content}
	d.rec.first = newImage(content)
	if err := os.WriteFile(d.CounterFile, make([]byte, counterSize), 0o600); err != nil {
		return nil, err
	}
	if d.counter, err = OpenCounter(d.CounterFile); err != nil {
		return nil, err
	}
	mountpoint := filepath.Join(dir, "fuse")
	if err := os.Mkdir(mountpoint, 0o700); err != nil {
		return nil, errors.Join(err, d.counter.Close())
	}
	d.server, err = fs.Mount(mountpoint, &root{disk: d}, &fs.Options{MountOptions: fuse.MountOptions{
		DirectMountStrict: true, FsName: "kedge-blockrecorder", Name: "blockrecorder", MaxWrite: 512 << 10,
	}})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount the file of the disk: %w", err), d.counter.Close())
	}
	if d.Device, err = Attach(filepath.Join(mountpoint, diskName)); err != nil {
		return nil, errors.Join(err, d.server.Unmount(), d.counter.Close())
	}
	return d, nil
}

// Close removes the device, which must not be mounted any more. Close waits for the last writes.
func (d *Disk) Close() error {
	return errors.Join(Detach(d.Device), d.server.Unmount(), d.counter.Close())
}

// Recording returns what was recorded so far.
func (d *Disk) Recording() Recording {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.rec.clone()
}

// Flushes returns the number of flushes so far.
func (d *Disk) Flushes() uint64 { return d.counter.Load() }

// FailFlush makes the next flush fail. Those after it succeed, as with a real disk that has dropped what it could not store.
func (d *Disk) FailFlush() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failNext = true
}

// FailWrite makes the next write fail, and nothing of it reach the disk.
func (d *Disk) FailWrite() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.failData = true
}

// Slow makes each flush take as long as delay says; nil makes the disk fast again.
func (d *Disk) Slow(delay func() time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.delay = delay
}

// Stall makes writes and flushes wait until resume is called, which must be before [Disk.Close].
func (d *Disk) Stall() (resume func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	stalled := make(chan struct{})
	d.stalled = stalled
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.stalled = nil
		close(stalled)
	})
}

// lock locks mu as soon as the disk does not stall.
func (d *Disk) lock() {
	for {
		d.mu.Lock()
		stalled := d.stalled
		if stalled == nil {
			return
		}
		d.mu.Unlock()
		<-stalled
	}
}

// Attach makes a loop device of a file, with direct I/O, and returns its path.
func Attach(file string) (device string, err error) {
	out, err := exec.Command("losetup", "--find", "--show", "--direct-io=on", file).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("make a loop device of %s: %w: %s", file, err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// Detach removes a loop device.
func Detach(device string) error {
	if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
		return fmt.Errorf("remove the loop device %s: %w: %s", device, err, out)
	}
	return nil
}

// root is the directory with the file of the disk.
type root struct {
	fs.Inode
	disk *Disk
}

// OnAdd implements fs.NodeOnAdder.
func (r *root) OnAdd(ctx context.Context) {
	r.AddChild(diskName, r.NewPersistentInode(ctx, &file{disk: r.disk}, fs.StableAttr{Mode: syscall.S_IFREG}), false)
}

// file is the file of the disk.
type file struct {
	fs.Inode
	disk *Disk
}

var (
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
	_ fs.NodeWriter    = (*file)(nil)
	_ fs.NodeFsyncer   = (*file)(nil)
)

// Getattr implements fs.NodeGetattrer.
func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size = syscall.S_IFREG|0o600, uint64(len(f.disk.content))
	return 0
}

// Open implements fs.NodeOpener. The kernel keeps no copy of what is written.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

// Read implements fs.NodeReader.
func (f *file) Read(_ context.Context, _ fs.FileHandle, dest []byte, offset int64) (fuse.ReadResult, syscall.Errno) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	if offset >= int64(len(f.disk.content)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(dest[:copy(dest, f.disk.content[offset:])]), 0
}

// Write implements fs.NodeWriter.
func (f *file) Write(_ context.Context, _ fs.FileHandle, data []byte, offset int64) (uint32, syscall.Errno) {
	f.disk.lock()
	defer f.disk.mu.Unlock()
	if offset+int64(len(data)) > int64(len(f.disk.content)) {
		return 0, syscall.ENOSPC
	}
	if f.disk.failData {
		f.disk.failData = false
		return 0, syscall.EIO
	}
	copy(f.disk.content[offset:], data)
	f.disk.rec.write(offset, data)
	return uint32(len(data)), 0
}

// Fsync implements fs.NodeFsyncer: it is a flush of the device.
func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	f.disk.lock()
	delay := f.disk.delay
	f.disk.mu.Unlock()
	if delay != nil {
		time.Sleep(delay())
	}
	f.disk.lock()
	defer f.disk.mu.Unlock()
	if f.disk.failNext {
		f.disk.failNext = false
		return syscall.EIO
	}
	f.disk.rec.flush()
	f.disk.counter.add()
	return 0
}

const counterSize = 8

// Counter is a number that processes share.
type Counter struct {
	memory []byte
	value  *uint64
}

// OpenCounter opens the counter of a disk.
func OpenCounter(path string) (*Counter, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	memory, err := unix.Mmap(int(f.Fd()), 0, counterSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return &Counter{memory: memory, value: (*uint64)(unsafe.Pointer(&memory[0]))}, nil
}

// Load returns the number of flushes so far.
func (c *Counter) Load() uint64 { return atomic.LoadUint64(c.value) }

func (c *Counter) add() { atomic.AddUint64(c.value, 1) }

// Close ends the use of the counter.
func (c *Counter) Close() error { return unix.Munmap(c.memory) }
