package resolvconf

import (
	"os"
	"path/filepath"
	"testing"
)

func TestFind(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	stub := file("stub", "# by resolved\nnameserver 127.0.0.53\noptions edns0\n")
	real := file("real", "search x\nnameserver 192.0.2.1\n")
	six := file("six", "nameserver fe80::1%eth0\n")
	none := filepath.Join(dir, "none")
	for _, tc := range []struct {
		in   []string
		want string
	}{
		{[]string{real, stub}, real}, {[]string{stub, real}, real}, {[]string{none, six}, six},
		{[]string{stub}, ""}, {[]string{none}, ""}, {[]string{file("mixed", "nameserver ::1\nnameserver 2001:db8::1\n")}, filepath.Join(dir, "mixed")},
	} {
		if got := find(tc.in); got != tc.want {
			t.Errorf("%v: %q, want %q", tc.in, got, tc.want)
		}
	}
}
