package appliance

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestOwnDirectories: an installation whose removal would take files of others is refused before anything is changed.
func TestOwnDirectories(t *testing.T) {
	for name, test := range map[string]struct {
		change func(m Machine, in *Install, put func(path string))
		want   string // in the error; empty for none
	}{
		"/var":               {func(_ Machine, in *Install, _ func(string)) { in.DataDir = "/var" }, " /var is a directory of the system, and kedge needs one of its own, such as /var/lib/kedge"},
		"/run":               {func(_ Machine, in *Install, _ func(string)) { in.RunDir = "/run" }, " /run is a directory of the system, and kedge needs one of its own, such as /run/kedge"},
		"logs of others":     {func(_ Machine, in *Install, put func(string)) { put("/data/log/syslog"); in.DataDir = "/data" }, " /data has log, which is not kedge's"},
		"a socket of others": {func(_ Machine, in *Install, put func(string)) { put("/srv/x/docker.sock"); in.RunDir = "/srv/x" }, " /srv/x has docker.sock, which is not kedge's"},
		"a file":             {func(_ Machine, in *Install, put func(string)) { put("/data"); in.DataDir = "/data" }, " /data is not a directory"},
		"other files": {func(_ Machine, in *Install, put func(string)) {
			put("/data/images/a.tar")
			put("/data/of-the-user")
			in.DataDir = "/data"
		}, ""},
		"authorities of one's own": {func(_ Machine, in *Install, put func(string)) {
			put("/data/server/tls/server-ca.crt")
			put("/data/server/tls/server-ca.key")
			in.DataDir = "/data"
		}, ""},
		"a server of others": {func(_ Machine, in *Install, put func(string)) {
			put("/data/server/tls/server-ca.crt")
			put("/data/server/tls/web.crt")
			in.DataDir = "/data"
		}, " /data has server, which is not kedge's"},
		"a node that ran before": {func(_ Machine, in *Install, put func(string)) {
			put("/data/kedge.json")
			put("/data/server/tls/x")
			put("/srv/x/kedge.lock")
			put("/srv/x/control.sock")
			in.DataDir, in.RunDir = "/data", "/srv/x"
		}, ""},
		"a program in place of the folder of programs": {func(_ Machine, in *Install, put func(string)) { put("/etc/hosts"); in.BinDir = "/etc/hosts" }, "/etc/hosts is not a directory; choose another folder with --bin-dir"},
		"a folder below a file":                        {func(_ Machine, in *Install, put func(string)) { put("/etc/hosts"); in.BinDir = "/etc/hosts/bin" }, "/etc/hosts is not a directory; choose another folder with --bin-dir"},
	} {
		m, _, in := newMachine(t)
		test.change(m, &in, func(path string) {
			if err := errors.Join(os.MkdirAll(filepath.Dir(m.path(path)), 0o755), os.WriteFile(m.path(path), nil, 0o600)); err != nil {
				t.Fatal(err)
			}
		})
		_, err := m.Plan(t.Context(), in)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// TestDamagedJournal: nothing is removed by a journal that kedge has not written.
func TestDamagedJournal(t *testing.T) {
	m, _, in := newMachine(t)
	m.mustInstall(t, in)
	file := m.path("/var/lib/kedge/install.json")
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"empty":                  "",
		"an object":              "{}",
		"no run directory":       strings.Replace(string(whole), `"runDir": "/run/kedge"`, `"runDir": ""`, 1),
		"of a directory":         strings.Replace(string(whole), `"dataDir": "/var/lib/kedge"`, `"dataDir": "/var"`, 1),
		"with a relative path":   strings.Replace(string(whole), `"path": "/etc/kedge/token"`, `"path": "etc/kedge/token"`, 1),
		"with a path that rises": strings.Replace(string(whole), `"path": "/etc/kedge/token"`, `"path": "/etc/kedge/../passwd"`, 1),
		"too large":              string(whole) + strings.Repeat(" ", maxConfig),
	} {
		if text == string(whole) {
			t.Fatalf("%s: the journal is as it was:\n%s", name, text)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := m.PlanRemoval(Uninstall{DataDir: in.DataDir, Purge: true}); err == nil {
			t.Errorf("%s: it would be removed:\n%s", name, r)
		}
		if _, err := m.Plan(t.Context(), in); err == nil {
			t.Errorf("%s: it would be installed", name)
		}
	}
}
