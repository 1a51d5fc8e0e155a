package config

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

var keys = []Key{{"node-name", String}, {"debug", Bool}, {"https-listen-port", Int}, {"grace", Duration}, {"kubelet-arg", List}, {"tls-san", List}}

func write(t *testing.T, dir, name, content string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLaterFilesReplaceAndPlusAppends(t *testing.T) {
	dir := t.TempDir()
	path := write(t, dir, "config.yaml", "node-name: a\ndebug: true\nkubelet-arg: [x=1]\ntls-san: one\nhttps-listen-port: 6444\n")
	write(t, dir, "config.yaml.d/20.yaml", "kubelet-arg+:\n- y=2\n")
	write(t, dir, "config.yaml.d/10.yaml", "# only this\nnode-name: b\ntls-san: [two, three]\n")
	write(t, dir, "config.yaml.d/30.txt", "rubbish: [")
	files, err := Files(path, false)
	if err != nil || len(files) != 3 {
		t.Fatalf("files %v, %v", files, err)
	}
	got, err := Load(files, keys)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]string{
		"node-name": {"b"}, "debug": {"true"}, "kubelet-arg": {"x=1", "y=2"}, "tls-san": {"two", "three"}, "https-listen-port": {"6444"},
	} {
		if !reflect.DeepEqual(got[name].Items, want) {
			t.Errorf("%s is %q, want %q", name, got[name].Items, want)
		}
	}
	if want := []string{path + ":3", filepath.Join(dir, "config.yaml.d", "20.yaml") + ":2"}; !slices.Equal(got["kubelet-arg"].Sources, want) {
		t.Errorf("kubelet-arg is from %q, want %q", got["kubelet-arg"].Sources, want)
	}
	if want := filepath.Join(dir, "config.yaml.d", "10.yaml") + ":2"; got["node-name"].Source != want {
		t.Errorf("source %s, want %s", got["node-name"].Source, want)
	}
}

func TestMistakesNameFileAndLine(t *testing.T) {
	for _, tc := range []struct{ content, want string }{
		{"debug: true\nnode-nmae: x\n", `config.yaml:2: unknown key "node-nmae"; did you mean "node-name"?`},
		{"zzzzzzzz: x\n", `config.yaml:1: unknown key "zzzzzzzz"`},
		{"debug: perhaps\n", `config.yaml:1: debug: "perhaps" is neither true nor false`},
		{"https-listen-port: many\n", `config.yaml:1: https-listen-port: "many" is not a whole number`},
		{"grace: 5\n", `config.yaml:1: grace: "5" is not a duration such as 30s or 5m`},
		{"node-name: [a, b]\n", `config.yaml:1: node-name: want one value`},
		{"kubelet-arg: {a: b}\n", `config.yaml:1: kubelet-arg: want a value or a list of values`},
		{"node-name+: a\n", `config.yaml:1: "node-name" takes one value, so "+" cannot append to it`},
		{"debug: true\n# x\ndebug: false\n", `config.yaml:3: debug is in line 1 already; give it once`},
		{"kubelet-arg: [a]\nkubelet-arg+: [b]\n", `config.yaml:2: kubelet-arg is in line 1 already; give it once`},
		{"node-name: a\n---\ndebug: true\n", `config.yaml:3: a second YAML document begins here; a file has one, so take out the line "---"`},
		{"---\nnode-name: a\n---\n---\ndebug: true\n", `config.yaml:5: a second YAML document`},
		{"debug: true\n---\na: b: c\n", `config.yaml:3: not valid YAML: `},
		{"- a\n", `config.yaml:1: want lines of the form "flag: value"`},
		{"a: b: c\n", `config.yaml:1: not valid YAML: `},
		{"# x\na: b: c\n", `config.yaml:2: not valid YAML: `},
		{"# x\nnode-label: [a\ndebug: true\n", `config.yaml:2: not valid YAML: `},
	} {
		path := write(t, t.TempDir(), "config.yaml", tc.content)
		_, err := Load([]string{path}, keys)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%q gives %v, want %q", tc.content, err, tc.want)
		}
	}
}

func TestEmptyDocumentsAreNone(t *testing.T) {
	for _, content := range []string{"", "# nothing\n", "---\n", "---\nnode-name: a\n", "node-name: a\n---\n# nothing more\n", "node-name: a\n...\n"} {
		got, err := Load([]string{write(t, t.TempDir(), "config.yaml", content)}, keys)
		if err != nil || strings.Contains(content, "name") != (len(got["node-name"].Items) == 1) {
			t.Errorf("%q gives %v, %v", content, got, err)
		}
	}
}

func TestMissingFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "config.yaml")
	if files, err := Files(path, false); err != nil || len(files) != 0 {
		t.Errorf("the default file may be missing: %v, %v", files, err)
	}
	if _, err := Files(path, true); err == nil {
		t.Error("a file that the user named may not be missing")
	}
}

func TestNearest(t *testing.T) {
	names := []string{"node-name", "node-ip", "data-dir", "cluster-cidr", "service-cidr"}
	for in, want := range map[string]string{"nodename": "node-name", "node_ip": "node-ip", "datadir": "data-dir", "clutser-cidr": "cluster-cidr", "qqq": ""} {
		if got := Nearest(in, names); got != want {
			t.Errorf("Nearest(%q) is %q, want %q", in, got, want)
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte("node-name: a\nkubelet-arg+: [b]\n"))
	f.Add([]byte("a: &x [*x]\n"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_ = load("f", data, keys, map[string]Value{})
	})
}
