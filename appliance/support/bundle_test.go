package support

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestBounds: files and the bundle have a size, parts a time, and the bundle says what it lacks.
func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		parts := []part{
			{"one", func(_ context.Context, add func(string, []byte)) error {
				add("kernel/large", append([]byte("first"), make([]byte, mostFile)...))
				add("logs/large", append(make([]byte, mostFile), []byte("last")...))
				return errors.New("no permission")
			}},
			{"hangs", func(_ context.Context, add func(string, []byte)) error {
				add("early", []byte("early"))
				<-release
				add("late", []byte("late"))
				return nil
			}},
		}
		for range 8 {
			parts = append(parts, part{"many", func(_ context.Context, add func(string, []byte)) error {
				add("part", append([]byte{0x1f, 0x8b}, make([]byte, mostFile-2)...))
				return nil
			}})
		}
		var bundle bytes.Buffer
		start := time.Now()
		s, err := Config{Node: "n", DataDir: "/nonexistent"}.write(t.Context(), &bundle, time.Now(), parts)
		if took := time.Since(start); err != nil || took != partLimit {
			t.Errorf("%v, took %s", err, took)
		}
		close(release)
		files := unpack(t, bundle.Bytes())
		if f := files["kernel/large"]; !strings.HasPrefix(f, "first") || len(f) > mostFile+100 || !strings.Contains(f, "[5 bytes are left out here]") {
			t.Errorf("the file has %d bytes", len(f))
		}
		if f := files["logs/large"]; !strings.HasSuffix(f, "last") || len(f) > mostFile+100 || !strings.HasPrefix(f, "[4 bytes are left out here]") {
			t.Errorf("the log has %d bytes", len(f))
		}
		if files["early"] != "early" || files["late"] != "" {
			t.Errorf("of the part that hangs: %q, %q", files["early"], files["late"])
		}
		for _, want := range []string{"one: no permission", "hangs: it did not finish within 15s", "part: the bundle has reached its size of 64 MiB"} {
			if !strings.Contains(strings.Join(s.Missing, "\n"), want) || !strings.Contains(files["missing.txt"], want) {
				t.Errorf("no %q in %q", want, s.Missing)
			}
		}
	})
}

func TestFilter(t *testing.T) {
	var in any
	if err := json.Unmarshal([]byte(`{"a":{"b":1,"c":2,"d":[{"e":1,"f":2},{"f":3},"text"]},"g":{"h":{"i":1}},"j":"text"}`), &in); err != nil {
		t.Fatal(err)
	}
	got := fields("a.b", "a.d.e", "g.h", "x.y", "j.k").filter(in)
	want := map[string]any{
		"a": map[string]any{"b": 1.0, "d": []any{map[string]any{"e": 1.0}, map[string]any{}, nil}},
		"g": map[string]any{"h": map[string]any{"i": 1.0}}, "j": nil,
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestMounts(t *testing.T) {
	got := string(mounts("//server/share /mnt cifs rw,username=me,password=secret,noexec,errors=remount-ro 0 0\n\n"))
	if got != "//server/share /mnt cifs rw,noexec,errors=remount-ro\n" {
		t.Errorf("%q", got)
	}
}

// TestTail returns whole lines.
func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, []byte("first\nsecond\nthird\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for most, want := range map[int64]string{19: "first\nsecond\nthird\n", 10: "third\n", 8: "third\n"} {
		if got, err := tail(path, most); err != nil || string(got) != want {
			t.Errorf("%d bytes: %q, %v, want %q", most, got, err, want)
		}
	}
}

// TestJournal: journalctl of the host is asked for the unit, and its complaint is told.
func TestJournal(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	script := "#!/bin/sh\ncase \"$*\" in *--unit=kedge) echo a line;; *) echo no such unit >&2; exit 1;; esac\n"
	if err := os.WriteFile(filepath.Join(dir, "journalctl"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	add := func(name string, data []byte) { got[name] = string(data) }
	if err := (Config{Unit: "kedge"}).journal(t.Context(), add); err != nil || got["logs/journal.txt"] != "a line\n" {
		t.Errorf("%v, %q", err, got)
	}
	if err := (Config{Unit: "other"}).journal(t.Context(), add); err == nil || !strings.Contains(err.Error(), "no such unit") {
		t.Errorf("%v", err)
	}
}

// TestScrub: texts of the form of a secret are replaced, and others are not.
func TestScrub(t *testing.T) {
	s := newScrubber([]string{"correct-horse", "correct-horse-battery", "ab"})
	for in, want := range map[string]string{
		"correct-horse-battery correct-horse ab":         "*** *** ab",
		"key AGE-SECRET-KEY-1GFPYYSJZGFPYYSJ x":          "key *** x",
		"token eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJr.c2ln x": "token *** x",
		"https://registry.example:5000/v2/":              "https://registry.example:5000/v2/",
		"https://u:p4ss@registry.example/":               "https://u:***@registry.example/",
		"secret \"db\" not found":                        "secret \"db\" not found",
		"API_KEY=abcdef":                                 "API_KEY=***",
		"configmap \"c\" not found; token expired":       "configmap \"c\" not found; token expired",
	} {
		if got := string(s.clean([]byte(in))); got != want {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}
