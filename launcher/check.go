package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"kedge/launcher/packedprogram"
)

// open returns the program in a place, open and checked: it is complete, it has the right content, and only
// this user and root could have written it. All checks use the open file. If there is no program, the error
// wraps fs.ErrNotExist.
func open(p place, m packedprogram.Manifest) (f *os.File, err error) {
	dir := filepath.Join(p.dir, m.ID())
	if err := trustedDir(p.dir, p.cache); err != nil {
		return nil, err
	}
	in, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	self, err := in.Stat(".")
	if err != nil {
		return nil, err
	}
	if err := trusted(dir, self); err != nil {
		return nil, err
	}
	if f, err = in.Open(packedprogram.ProgramName); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
			f = nil
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := trusted(f.Name(), st); err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() != m.Size || !isDurable(in) {
		return nil, fmt.Errorf("%s is not complete: %w", f.Name(), fs.ErrNotExist)
	}
	boot := packedprogram.BootID()
	if checked, err := in.ReadFile(packedprogram.CheckedName); err == nil && string(checked) == boot {
		return f, nil
	}
	if err := sameContent(f, m); err != nil {
		return nil, err
	}
	if p.cache {
		// Elsewhere the program writes the file itself when its start is complete.
		_ = in.WriteFile(packedprogram.CheckedName, []byte(boot), 0o644) // a failure costs another check of the content at the next start
	}
	return f, nil
}

// isDurable reports whether a program was synced to disk, or was written since the machine booted.
func isDurable(in *os.Root) bool {
	if _, err := in.Stat(packedprogram.SyncedName); err == nil {
		return true
	}
	boot, err := in.ReadFile(packedprogram.BootName)
	return err == nil && string(boot) == packedprogram.BootID()
}

var errDamaged = errors.New("is damaged")

// sameContent verifies the program's checksum: the disk may have changed bits in it since it was written.
func sameContent(f *os.File, m packedprogram.Manifest) error {
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return fmt.Errorf("the unpacked program %s cannot be read: %w", f.Name(), err)
	}
	if hex.EncodeToString(sum.Sum(nil)) != m.SHA256 {
		return fmt.Errorf("the unpacked program %s %w", f.Name(), errDamaged)
	}
	return nil
}

// nearestExisting returns dir, or the nearest parent directory that exists.
func nearestExisting(dir string) string {
	for {
		if _, err := os.Lstat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// trustedDir returns an error if another user could put a program into a directory. With all it also checks
// every parent directory, because a cache may be in a directory that all users can write to.
func trustedDir(dir string, all bool) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	for {
		st, err := os.Lstat(dir)
		if err == nil && st.Mode()&fs.ModeSymlink != 0 && dir != "/" {
			// The owner of the link must be trusted, and then the target of the link.
			if err := trusted(dir, st); err != nil {
				return err
			}
			st, err = os.Stat(dir)
		}
		if err != nil {
			return err
		}
		if err := trusted(dir, st); err != nil {
			return err
		}
		if !all || dir == "/" {
			return nil
		}
		dir = filepath.Dir(dir)
	}
}

// trusted returns an error if another user could have created or can change a file. In a directory with the
// sticky bit, users can rename only their own files.
func trusted(name string, st fs.FileInfo) error {
	sys, ok := st.Sys().(*syscall.Stat_t)
	link := st.Mode()&fs.ModeSymlink != 0
	sticky := st.IsDir() && st.Mode()&fs.ModeSticky != 0
	switch {
	case !ok:
		return fmt.Errorf("%s has no owner", name)
	case int(sys.Uid) != os.Geteuid() && sys.Uid != 0:
		return fmt.Errorf("%s belongs to user %d, who could replace the program in it; remove it, or choose another directory", name, sys.Uid)
	case st.Mode().Perm()&0o022 != 0 && !link && !sticky:
		return fmt.Errorf("%s can be written by other users (mode %s), who could replace the program in it; remove that permission with \"chmod go-w\"", name, st.Mode().Perm())
	}
	return nil
}
