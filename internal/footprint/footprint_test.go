package footprint

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestCgroupLimit(t *testing.T) {
	for _, tc := range []struct {
		name, self string
		files      map[string]string
		want       int64
	}{
		{"v2", "0::/a/b\n", map[string]string{"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000},
		{"v1 hybrid", "8:pids:/\n4:memory:/x\n0::/\n", map[string]string{"memory/x/memory.limit_in_bytes": "2000", "memory/memory.limit_in_bytes": "9223372036854771712"}, 2000},
		{"none", "0::/\n", map[string]string{"memory.max": "max"}, 0},
		{"no controller", "0::/\n", nil, 0},
	} {
		dir := t.TempDir()
		for name, content := range tc.files {
			path := filepath.Join(dir, name)
			os.MkdirAll(filepath.Dir(path), 0o755)
			os.WriteFile(path, []byte(content+"\n"), 0o644)
		}
		self := filepath.Join(dir, "self")
		os.WriteFile(self, []byte(tc.self), 0o644)
		got, ok := cgroupLimit(self, dir)
		if ok != (tc.want > 0) || ok && got != tc.want {
			t.Errorf("%s: %d, %v; want %d", tc.name, got, ok, tc.want)
		}
	}
}

func TestReadOnlyMapping(t *testing.T) {
	for line, want := range map[string]bool{
		"00400000-05000000 r-xp 00000000 fe:00 123  /bin/kedge": true,
		"05000000-07000000 r--p 04c00000 fe:00 123  /bin/kedge": true,
		"07000000-07100000 rw-p 06c00000 fe:00 123  /bin/kedge": false,
		"05000000-07000000 r--p 04c00000 fe:00 123  /bin/other": false,
		"7f0000000000-7f0000001000 r--p 00000000 00:00 0":       false,
		"rubbish": false,
	} {
		if begin, end, ok := readOnlyMapping(line, "/bin/kedge"); ok != want || ok && (begin == 0 || end <= begin) {
			t.Errorf("%q: %x-%x %v", line, begin, end, ok)
		}
	}
}

// The process must go on working after its pages were dropped, and be smaller.
func TestSettle(t *testing.T) {
	before := residentFile(t)
	if err := Settle(); err != nil {
		t.Fatal(err)
	}
	if after := residentFile(t); after >= before {
		t.Errorf("resident pages of files: %d before, %d after", before, after)
	}
}

func residentFile(t *testing.T) (pages int64) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	var size, resident, shared int64
	if _, err := fmt.Sscan(string(data), &size, &resident, &shared); err != nil {
		t.Fatal(err)
	}
	return shared
}
