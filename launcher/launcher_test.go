package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/launcher/packedprogram"
)

func TestDataDir(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "c.yaml")
	os.WriteFile(conf, []byte("# data-dir: /no\nnode-name: x\ndata-dir: \"/from/file\" # why\n"), 0o600)
	for _, tc := range []struct {
		args []string
		env  map[string]string
		want string
	}{
		{[]string{"kedge", "server", "--config", dir + "/none"}, nil, defaultDataDir},
		{[]string{"kedge", "server", "--config=" + conf}, nil, "/from/file"},
		{[]string{"kedge", "server"}, map[string]string{"KEDGE_CONFIG": conf}, "/from/file"},
		{[]string{"kedge", "server", "--config", conf}, map[string]string{"KEDGE_DATA_DIR": "/from/env"}, "/from/env"},
		{[]string{"kedge", "server", "--data-dir", "/a", "-data-dir=/b"}, map[string]string{"KEDGE_DATA_DIR": "/from/env"}, "/b"},
		{[]string{"kedge", "server", "-c", conf}, nil, "/from/file"},
		{[]string{"kedge", "killall", "-d", "/a", "-d=/b"}, nil, "/b"},
		{[]string{"kedge", "doctor", "-d", "/a", "-d=/b"}, nil, "/b"},
		{[]string{"kedge", "support-bundle", "-d", "/a", "-o", "x"}, nil, "/a"},
		{[]string{"kedge", "kubectl", "logs", "-c", conf, "-d=/b"}, nil, defaultDataDir},
	} {
		if got := dataDirOf(tc.args, tc.env); got != tc.want {
			t.Errorf("%v %v: %s, want %s", tc.args, tc.env, got, tc.want)
		}
	}
	os.Mkdir(conf+".d", 0o700)
	os.WriteFile(filepath.Join(conf+".d", "1.yaml"), []byte("data-dir: /drop-in\n"), 0o600)
	if got := dataDirOf([]string{"kedge", "server", "--config", conf}, nil); got != "/drop-in" {
		t.Errorf("with a drop-in: %s", got)
	}
}

// Only servers may make a data directory.
func TestPlaces(t *testing.T) {
	env := []string{"HOME=/home/u", "KEDGE_DATA_DIR=/d"}
	for _, tc := range []struct {
		args   []string
		uid    int
		create string // the first folder in which to unpack
	}{
		{[]string{"kedge", "server"}, 0, "/d/program"},
		{[]string{"kedge", "server", "--help"}, 0, "/home/u/.cache/kedge/program"},
		{[]string{"kedge", "agent", "--no", "--generate-bash-completion"}, 0, "/home/u/.cache/kedge/program"},
		{[]string{"kedge", "kubectl", "get", "nodes"}, 0, "/home/u/.cache/kedge/program"},
		{[]string{"kedge", "server"}, 1000, "/home/u/.cache/kedge/program"},
		{[]string{"kubectl"}, 1000, "/home/u/.cache/kedge/program"},
	} {
		for _, p := range places(tc.args, env, tc.uid) {
			if p.create {
				if p.dir != tc.create {
					t.Errorf("%v as %d unpacks in %s, want %s", tc.args, tc.uid, p.dir, tc.create)
				}
				break
			}
		}
	}
}

// A launcher that is killed leaves its folder behind; one that is at work keeps it.
func TestAbandonedFoldersAreRemoved(t *testing.T) {
	dir := t.TempDir()
	os.MkdirAll(filepath.Join(dir, tempPrefix+"killed"), 0o755)
	os.WriteFile(filepath.Join(dir, tempPrefix+"killed", "kedge"), []byte("abc"), 0o755)
	first, release, err := tempDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, tempPrefix+"killed")); !os.IsNotExist(err) {
		t.Errorf("the abandoned folder is still there: %v", err)
	}
	second, releaseSecond, err := tempDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer releaseSecond()
	if _, err := os.Stat(first); err != nil {
		t.Errorf("a folder in use was removed: %v", err)
	}
	release()
	if _, release, err = tempDir(dir); err != nil {
		t.Fatal(err)
	}
	defer release()
	if _, err := os.Stat(first); !os.IsNotExist(err) {
		t.Errorf("the folder that was given back is still there: %v", err)
	}
	if _, err := os.Stat(second); err != nil {
		t.Errorf("a folder in use was removed: %v", err)
	}
}

// fixture is a place with a program of three bytes in it, and its manifest.
func fixture(t *testing.T) (p place, m packedprogram.Manifest, in string) {
	t.Helper()
	p = place{dir: t.TempDir(), create: true}
	sum := sha256.Sum256([]byte("abc"))
	m = packedprogram.Manifest{Size: 3, SHA256: hex.EncodeToString(sum[:])}
	in = filepath.Join(p.dir, m.ID())
	if err := os.Mkdir(in, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(in, packedprogram.ProgramName), []byte("abc"), 0o755); err != nil {
		t.Fatal(err)
	}
	return p, m, in
}

func TestOpen(t *testing.T) {
	p, m, in := fixture(t)
	name := filepath.Join(in, packedprogram.ProgramName)
	mark := func(file, content string) { os.WriteFile(filepath.Join(in, file), []byte(content), 0o644) }
	expect := func(want bool, what string) {
		t.Helper()
		f, err := open(p, m)
		if err == nil {
			f.Close()
		}
		if (err == nil) != want {
			t.Errorf("%s: %v", what, err)
		}
	}
	expect(false, "neither synced nor of this boot")
	mark(packedprogram.BootName, "another boot")
	expect(false, "written in another boot, and not synced then")
	mark(packedprogram.BootName, packedprogram.BootID())
	expect(true, "written in this boot")
	os.Remove(filepath.Join(in, packedprogram.BootName))
	mark(packedprogram.SyncedName, "")
	expect(true, "synced")
	os.WriteFile(name, []byte("ab"), 0o755)
	expect(false, "too short")
	os.WriteFile(name, []byte("abd"), 0o755)
	expect(false, "a bit is flipped")
	mark(packedprogram.CheckedName, "another boot")
	expect(false, "a bit is flipped, and it was good in another boot")
	os.WriteFile(name, []byte("abc"), 0o755)
	expect(true, "whole again")
	os.Chmod(name, 0o777)
	expect(false, "writable by everybody")
	os.Chmod(name, 0o755)
	os.Chmod(in, 0o777)
	expect(false, "in a directory that is writable by everybody")
	os.Chmod(in, 0o755)
	os.Chmod(p.dir, 0o775)
	expect(false, "below a directory that is writable by a group")
	os.Chmod(p.dir, 0o755)
	expect(true, "nothing wrong any more")
	os.Remove(name)
	os.Symlink("/bin/true", name)
	expect(false, "a link to elsewhere")
	os.RemoveAll(in)
	if _, err := open(p, m); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing there: %v", err)
	}
}

// What was checked in this boot is not read again, so that a restart costs nothing; a cache
// notes that by itself.
func TestCheckedOnceInABoot(t *testing.T) {
	p, m, in := fixture(t)
	os.WriteFile(filepath.Join(in, packedprogram.SyncedName), nil, 0o644)
	flip := func() error {
		os.WriteFile(filepath.Join(in, packedprogram.ProgramName), []byte("abd"), 0o755)
		f, err := open(p, m)
		if err == nil {
			f.Close()
		}
		os.WriteFile(filepath.Join(in, packedprogram.ProgramName), []byte("abc"), 0o755)
		return err
	}
	if err := flip(); !errors.Is(err, errDamaged) {
		t.Errorf("before it was checked: %v", err)
	}
	if err := packedprogram.Keep(p.dir, filepath.Join(in, packedprogram.ProgramName), 0); err != nil {
		t.Fatal(err)
	}
	if err := flip(); err != nil {
		t.Errorf("after the program has said that its start is over: %v", err)
	}
	os.Remove(filepath.Join(in, packedprogram.CheckedName))
	p.cache = true
	f, err := open(p, m)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if err := flip(); err != nil {
		t.Errorf("in a cache, checked before: %v", err)
	}
}

// A cache is used only where nobody else could have made any directory that leads there.
func TestCacheOfSomebodyElse(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("gives files away, which needs root")
	}
	p, m, in := fixture(t)
	os.WriteFile(filepath.Join(in, packedprogram.SyncedName), nil, 0o644)
	outer := filepath.Dir(p.dir)
	before := nearestExisting(filepath.Join(outer, "not", "there"))
	if before != outer {
		t.Errorf("the directory above is %s, want %s", before, outer)
	}
	if err := os.Chown(outer, 4711, 4711); err != nil {
		t.Fatal(err)
	}
	if f, err := open(p, m); err != nil {
		t.Errorf("a data directory: %v", err)
	} else {
		f.Close()
	}
	p.cache = true
	if _, err := open(p, m); err == nil || !strings.Contains(err.Error(), "belongs to user 4711") {
		t.Errorf("a cache: %v", err)
	}
	p.dir = filepath.Join(outer, "new", "program")
	if _, err := unpack(m, p); err == nil || !strings.Contains(err.Error(), "belongs to user 4711") {
		t.Errorf("a new cache: %v", err)
	}
	if _, err := os.Stat(filepath.Dir(p.dir)); err == nil {
		t.Error("something was made in the directory of another user")
	}
}

// Root never keeps its program in the directory for everybody.
func TestRootDoesNotUseTmp(t *testing.T) {
	for _, env := range [][]string{nil, {"HOME=/root"}, {"TMPDIR=/tmp"}} {
		for _, args := range [][]string{{"kedge", "server"}, {"kedge", "check"}, {"kubectl"}} {
			for _, p := range places(args, env, 0) {
				if strings.HasPrefix(p.dir, os.TempDir()) {
					t.Errorf("%v with %v uses %s", args, env, p.dir)
				}
			}
		}
	}
}
