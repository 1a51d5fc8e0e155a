package datastore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestReadSnapshot: the latest values of a snapshot's keys, in order, of more keys than are read at a time.
func TestReadSnapshot(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	client, err := s.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	const n = 2*pageOfKeys + 1
	var want []string
	for i := range n {
		key := fmt.Sprintf("/a/%05d", i)
		for _, value := range []string{"before", "after"} {
			if _, err := client.Client.Put(t.Context(), key, value); err != nil {
				t.Fatal(err)
			}
		}
		if i%10 == 0 {
			if _, err := client.Client.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want = append(want, key+" after")
	}
	for _, key := range []string{"/b/1", "/", "/c"} {
		if _, err := client.Client.Put(t.Context(), key, "x"); err != nil {
			t.Fatal(err)
		}
	}
	saved, err := s.SaveSnapshot(t.Context(), filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	note := func(key string, value []byte) error {
		got = append(got, key+" "+string(value))
		return nil
	}
	if err := ReadSnapshot(t.Context(), saved.Path, t.TempDir(), []string{"/b/", "/a/"}, note); err != nil {
		t.Fatal(err)
	}
	if want = append([]string{"/b/1 x"}, want...); !slices.Equal(got, want) {
		t.Errorf("%d keys, want %d; the first are %q", len(got), len(want), got[:min(3, len(got))])
	}
	stop := errors.New("stop")
	if err := ReadSnapshot(t.Context(), saved.Path, t.TempDir(), []string{"/a/"}, func(string, []byte) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("the caller's error is lost: %v", err)
	}
	if _, err := VerifySnapshot(saved.Path); err != nil {
		t.Errorf("the snapshot was changed: %v", err)
	}
	if err := os.Truncate(saved.Path, saved.Size-4096); err != nil {
		t.Fatal(err)
	}
	if err := ReadSnapshot(t.Context(), saved.Path, t.TempDir(), []string{"/a/"}, note); err == nil || !strings.Contains(err.Error(), "is not as it was written") {
		t.Errorf("a truncated file: %v", err)
	}
}
