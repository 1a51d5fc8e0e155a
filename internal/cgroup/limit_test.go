package cgroup

import (
	"os"
	"path/filepath"
	"testing"
)

func TestMemoryLimit(t *testing.T) {
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
		got, ok := MemoryLimit(self, dir)
		if ok != (tc.want > 0) || ok && got != tc.want {
			t.Errorf("%s: %d, %v; want %d", tc.name, got, ok, tc.want)
		}
	}
}
