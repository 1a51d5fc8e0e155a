package archive

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestFolder(t *testing.T) {
	dir := t.TempDir()
	database := []byte("database")
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	put := func(prefix, node string, hour int) string {
		h := headerFor(database)
		h.Node, h.Taken = node, begin.Add(time.Duration(hour)*time.Hour)
		path := filepath.Join(dir, FileName(prefix, node, h.Taken))
		if err := os.WriteFile(path, write(t, h, key, nil, database), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var scheduled []string
	for hour := range 4 {
		scheduled = append(scheduled, put(Scheduled, "n-1", hour))
	}
	others := []string{put(OnDemand, "n-1", 5), put(Scheduled, "n", 6), put("scheduled-n", "1", 7)}
	for name, content := range map[string]string{".tmp-x.kedge": "", "notes.txt": "", "broken.kedge": "x", "before-upgrade-1.db": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all, err := List(dir)
	if err != nil || len(all) != len(scheduled)+len(others)+2 {
		t.Fatalf("%d snapshots, %v", len(all), err)
	}
	for _, l := range all {
		switch filepath.Base(l.Path) {
		case "broken.kedge":
			if l.Err == nil {
				t.Error("a broken file has no error")
			}
		case "before-upgrade-1.db":
			if !l.DatabaseOnly || l.Err != nil {
				t.Errorf("a database is %+v", l)
			}
		default:
			if l.Err != nil || l.Header.Revision != 7 || l.Size == 0 {
				t.Errorf("%+v", l)
			}
		}
	}
	removed, err := Prune(dir, Scheduled, "n-1", 2)
	if err != nil || !slices.Equal(removed, scheduled[:2]) {
		t.Errorf("removed %v, %v", removed, err)
	}
	for _, path := range append(others, scheduled[2:]...) {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if removed, err = Prune(dir, Scheduled, "n-1", 2); err != nil || len(removed) > 0 {
		t.Errorf("again removed %v, %v", removed, err)
	}
	if all, err := List(filepath.Join(dir, "missing")); err != nil || len(all) > 0 {
		t.Errorf("a missing folder: %v, %v", all, err)
	}
	for _, bad := range []string{"", "-x", ".x", "a/b", "a b"} {
		if CheckPrefix(bad) == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
	if err := CheckPrefix("before_test-1.2"); err != nil {
		t.Error(err)
	}
}
