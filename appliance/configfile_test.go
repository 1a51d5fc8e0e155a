package appliance

import (
	"strings"
	"testing"
)

func one(key, value string) Setting { return Setting{Key: key, Values: []string{value}} }

func many(key string, values ...string) Setting {
	return Setting{Key: key, Values: values, List: true}
}

func drop(key string) Setting { return Setting{Key: key, Drop: true} }

func TestEditConfig(t *testing.T) {
	const users = `# My cluster.

node-name: edge-1   # in the cellar

# Zones of the building.
node-label:
  # The one by the door.
  - zone=a # first
  - zone=b
# After the labels.

https-listen-port: 6443
tls-san: [a.example, b.example]
# The end.
`
	for name, test := range map[string]struct {
		before   string
		settings []Setting
		after    string
	}{
		"a new file":               {"", []Setting{one("node-name", "n1"), many("node-label", "a=b", "c=d"), one("debug", "true"), one("https-listen-port", "7443")}, "node-name: n1\nnode-label:\n  - a=b\n  - c=d\ndebug: true\nhttps-listen-port: 7443\n"},
		"only comments":            {"# Mine.\n", []Setting{one("node-name", "n1")}, "# Mine.\nnode-name: n1\n"},
		"no newline at the end":    {"node-name: a", []Setting{one("debug", "true")}, "node-name: a\ndebug: true\n"},
		"nothing":                  {users, nil, users},
		"equal values":             {users, []Setting{one("node-name", "edge-1"), many("node-label", "zone=a", "zone=b"), one("https-listen-port", "6443"), many("tls-san", "a.example", "b.example")}, users},
		"one value":                {users, []Setting{one("node-name", "edge-2")}, strings.Replace(users, "edge-1   #", "edge-2 #", 1)},
		"a list":                   {users, []Setting{many("node-label", "zone=a", "zone=c")}, strings.Replace(users, "zone=b", "zone=c", 1)},
		"a flow list":              {users, []Setting{many("tls-san", "a.example")}, strings.Replace(users, ", b.example", "", 1)},
		"a new key":                {users, []Setting{one("debug", "true")}, strings.Replace(users, "# The end.\n", "debug: true\n# The end.\n", 1)},
		"a key less":               {users, []Setting{drop("https-listen-port"), drop("debug")}, strings.Replace(users, "https-listen-port: 6443\n", "", 1)},
		"the last key":             {"a: 1\nb: 2\n", []Setting{drop("b")}, "a: 1\n"},
		"the only key":             {"token-file: /x\n", []Setting{drop("token-file")}, ""},
		"end of document":          {"node-name: a\n---\n", []Setting{one("debug", "true")}, "node-name: a\ndebug: true\n---\n"},
		"quotes":                   {"", []Setting{one("node-name", "007"), one("x", ""), one("y", "a: b # c"), one("z", "null")}, "node-name: \"007\"\nx: \"\"\ny: 'a: b # c'\nz: \"null\"\n"},
		"appended":                 {"node-label+: [a=b]\n", []Setting{many("node-label", "a=b")}, "node-label: [a=b]\n"},
		"value in place of a list": {"kubelet-arg: max-pods=1 # few\n", []Setting{many("kubelet-arg", "max-pods=2", "v=3")}, "kubelet-arg: # few\n  - max-pods=2\n  - v=3\n"},
		"flow":                     {"{node-name: a, debug: true} # all\n", []Setting{one("node-name", "b")}, "{node-name: b, debug: true} # all\n"},
		"flow, new":                {"{node-name: a}\n", []Setting{one("debug", "true")}, "{node-name: a, debug: true}\n"},
		"block scalar":             {"node-name: >-\n  a\nx: 1\n", []Setting{one("node-name", "b")}, "node-name: b\nx: 1\n"},
	} {
		got, err := EditConfig([]byte(test.before), test.settings)
		if err != nil || string(got) != test.after {
			t.Errorf("%s: %v\n%s--- want\n%s", name, err, got, test.after)
		}
		again, err := EditConfig(got, test.settings)
		if err != nil || string(again) != string(got) {
			t.Errorf("%s: a second edit changes it: %v\n%s", name, err, Diff(got, again))
		}
	}
	if _, err := EditConfig([]byte("- a\n"), []Setting{one("x", "y")}); err == nil {
		t.Error("a list is no configuration file")
	}
	if _, err := EditConfig([]byte("a: &x 1\nb: *x\n"), []Setting{one("a", "2")}); err == nil {
		t.Error("another key refers to the value")
	}
	if _, err := EditConfig([]byte("a: [\n"), []Setting{one("x", "y")}); err == nil {
		t.Error("no YAML")
	}
}

// FuzzEditConfig: an edit that succeeds has made the value what it should be, and is stable.
func FuzzEditConfig(f *testing.F) {
	f.Add("a: 1\n# c\nb: [x, y] # z\n", "a", "2")
	f.Add("a:\n- x\n# c\n- y\n\nb: |\n  # no comment\n  t\n", "b", "# c")
	f.Add("{a: 1}", "b", "")
	f.Add("a: &x 1\nb: *x\n", "a", "3")
	f.Fuzz(func(t *testing.T, text, key, value string) {
		got, err := EditConfig([]byte(text), []Setting{one(key, value)})
		if err != nil {
			return
		}
		if again, err := EditConfig(got, []Setting{one(key, value)}); err != nil || string(again) != string(got) {
			t.Errorf("%q with %q: %q: %q, then %q, %v", text, key, value, got, again, err)
		}
	})
}

func TestDiff(t *testing.T) {
	got := Diff([]byte("a\nb\nc\n"), []byte("a\nx\nc\nd\n"))
	if got != "-b\n+x\n+d\n" {
		t.Errorf("%q", got)
	}
	if got := Diff(nil, []byte("a\n")); got != "+a\n" {
		t.Errorf("%q", got)
	}
}
