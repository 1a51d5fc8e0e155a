package throwaway

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
	"kedge/throwaway/machine"
)

// templateParts are the parts of a data directory that nodes of different clusters may share:
// programs, images, and containerd's metadata. Keys, certificates, the store and everything
// else that identifies a node are not among them.
var templateParts = []string{"program", "runtime", "containerd"}

// makingSuffix is the suffix of the folder in which a template is made.
const makingSuffix = ".making"

// key identifies the template for an executable and a set of archives.
func (cfg Config) key() (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, cfg.Version)
	for _, path := range append([]string{cfg.Program}, cfg.Images...) {
		st, err := os.Stat(path)
		if err != nil {
			return "", err
		}
		// As the import itself, which identifies a file by name, size and time.
		fmt.Fprintln(sum, filepath.Base(path), st.Size(), st.ModTime().UnixNano())
	}
	return hex.EncodeToString(sum.Sum(nil))[:16], nil
}

// template returns the folder of the template, and makes it if necessary: it starts a node on
// a machine without a cluster, which imports the archives, and stops it.
func (r Root) template(ctx context.Context, cfg Config, say func(string)) (string, error) {
	key, err := cfg.key()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(string(r), templateDir, key)
	release, err := r.lock(filepath.Join(templateDir, lockName))
	if err != nil {
		return "", err
	}
	defer release()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	say("preparing a node template, once for this kedge and these images")
	making := dir + makingSuffix
	if err := machine.Remove(making); err != nil { // of a command that was killed
		return "", err
	}
	site, err := machine.Create(machine.Config{Dir: making, Program: cfg.Program, Supervisor: cfg.Program, Tethered: true})
	if err != nil {
		return "", err
	}
	err = makeTemplate(ctx, cfg, site, dir)
	if err := errors.Join(err, site.Remove()); err != nil {
		return "", fmt.Errorf("prepare a template: %w", err)
	}
	return dir, nil
}

func makeTemplate(ctx context.Context, cfg Config, site *machine.Site, dir string) error {
	v4, _ := subnetOf(255)
	m, err := site.Add("template", []netip.Prefix{addressOf(v4, 2)}, addressOf(v4, 1).Addr())
	if err != nil {
		return err
	}
	for _, archive := range cfg.Images {
		if err := addImage(archive, m.Disk(dataDir)); err != nil {
			return err
		}
	}
	if err := start(m, Server); err != nil {
		return err
	}
	if err := untilAllReady(ctx, m); err != nil {
		return err
	}
	if err := m.SignalKedge(unix.SIGTERM); err != nil {
		return err
	}
	if st, err := m.WaitKedge(); err != nil || st.Ended != "exit code 0" {
		return errors.Join(err, fmt.Errorf("kedge ended: %s", st.Ended))
	}
	if err := m.PowerOff(); err != nil {
		return err
	}
	return keepParts(m.Disk(dataDir), dir)
}

// untilAllReady waits for every component of a node, the import of images included.
func untilAllReady(ctx context.Context, m *machine.Machine) error {
	for {
		run, err := m.Live(runDir)
		if err != nil {
			return err
		}
		report, err := control.GetReport(ctx, run)
		if err == nil && ready(report) {
			return nil
		}
		if st, err := m.Kedge(); err != nil || !st.Running {
			log, _ := os.ReadFile(m.Log())
			lines := strings.Split(strings.TrimSpace(string(log)), "\n")
			return errors.Join(err, fmt.Errorf("kedge ended (%s): %s", st.Ended, lines[len(lines)-1]))
		}
		if err := pause(ctx, pollInterval); err != nil {
			return err
		}
	}
}

func ready(r control.Report) bool {
	return len(r.Components) > 0 && !slices.ContainsFunc(r.Components, func(s lifecycle.Status) bool { return s.State != lifecycle.Ready })
}

// keepParts moves the parts of an unused data directory into a template.
func keepParts(data, dir string) error {
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	for _, part := range templateParts {
		if err := os.Rename(filepath.Join(data, part), filepath.Join(tmp, part)); err != nil {
			return err
		}
	}
	// The launcher takes a program as complete when it was written in this boot, or is known
	// to be on the disk. Machines have boot IDs of their own.
	programs, err := filepath.Glob(filepath.Join(tmp, "program", "*", "boot"))
	if err != nil {
		return err
	}
	unix.Sync()
	for _, p := range programs {
		if err := os.WriteFile(filepath.Join(filepath.Dir(p), "synced"), nil, 0o644); err != nil {
			return err
		}
	}
	return os.Rename(tmp, dir)
}

// clone puts the template's content into a data directory. Files that never change are hard
// links, which cost neither time nor space, and memory only once for all machines; other
// files are copied.
func clone(template, data string) error {
	return filepath.WalkDir(template, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(template, path)
		if err != nil {
			return err
		}
		to := filepath.Join(data, rel)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case d.IsDir():
			if err := os.MkdirAll(to, 0o755); err != nil {
				return err
			}
			return keepMode(to, info)
		case info.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			if err := os.Symlink(target, to); err != nil {
				return err
			}
			st := info.Sys().(*syscall.Stat_t)
			return os.Lchown(to, int(st.Uid), int(st.Gid))
		case unchanging(rel) || !info.Mode().IsRegular(): // devices in layers are links too
			return os.Link(path, to)
		}
		if err := copyFile(path, to); err != nil {
			return err
		}
		return keepMode(to, info)
	})
}

// unchanging reports whether a file is never written again where it is.
func unchanging(rel string) bool {
	parts := strings.Split(rel, string(filepath.Separator))
	switch parts[0] {
	case "program", "runtime":
		return true
	}
	return len(parts) > 3 && (parts[1] == "io.containerd.content.v1.content" && parts[2] == "blobs" ||
		strings.HasPrefix(parts[1], "io.containerd.snapshotter.v1.") && parts[2] == "snapshots")
}

func keepMode(path string, info fs.FileInfo) error {
	st := info.Sys().(*syscall.Stat_t)
	if err := os.Lchown(path, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	return unix.Chmod(path, st.Mode&0o7777) // os.Chmod takes fewer of the bits
}

// copyFile copies content, mode and time. It shares blocks if the file system can.
func copyFile(from, to string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, out.Close())
		if err == nil {
			err = os.Chtimes(to, time.Time{}, info.ModTime())
		}
	}()
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) == nil {
		return nil
	}
	_, err = io.Copy(out, in)
	return err
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// sweepTemplates removes templates that were never completed.
func (r Root) sweepTemplates() error {
	half, err := r.halfTemplates()
	if err != nil || len(half) == 0 {
		return err
	}
	release, err := r.tryLock(filepath.Join(templateDir, lockName))
	if errors.Is(err, errBusy) {
		return nil
	}
	if err != nil {
		return err
	}
	defer release()
	if half, err = r.halfTemplates(); err != nil { // again, with the lock
		return err
	}
	return removeHalf(half)
}

// halfTemplates returns the folders of templates that are being made.
func (r Root) halfTemplates() ([]string, error) {
	return filepath.Glob(filepath.Join(string(r), templateDir, "*"+makingSuffix))
}

func removeHalf(half []string) error {
	var errs []error
	for _, dir := range half {
		errs = append(errs, machine.Remove(dir))
	}
	return errors.Join(errs...)
}

// RemoveTemplates removes all templates. The next cluster makes its own.
func (r Root) RemoveTemplates() error {
	release, err := r.lock(filepath.Join(templateDir, lockName))
	if err != nil {
		return err
	}
	defer release()
	half, err := r.halfTemplates()
	if err == nil {
		err = removeHalf(half)
	}
	if err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(string(r), templateDir))
}
