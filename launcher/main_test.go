package main

import (
	"os"
	"path/filepath"
	"testing"

	"kedge/internal/packed"
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

func TestComplete(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "kedge")
	m := packed.Manifest{Size: 3, SHA256: "0123456789abcdef0123"}
	mark := func(file, content string) { os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644) }
	expect := func(want bool, what string) {
		t.Helper()
		if got := complete(name, m); got != want {
			t.Errorf("%s: complete is %v", what, got)
		}
	}
	expect(false, "nothing there")
	os.WriteFile(name, []byte("abc"), 0o755)
	expect(false, "neither synced nor of this boot")
	mark(packed.BootName, "another boot")
	expect(false, "written in another boot, and not synced then")
	mark(packed.BootName, bootID())
	expect(true, "written in this boot")
	os.Remove(filepath.Join(dir, packed.BootName))
	mark(packed.SyncedName, "")
	expect(true, "synced")
	os.WriteFile(name, []byte("ab"), 0o755)
	expect(false, "too short")
	os.WriteFile(name, []byte("abc"), 0o755)
	os.Chmod(name, 0o777)
	expect(false, "writable by everybody")
}
