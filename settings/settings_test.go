package settings

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
)

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

func variables(pairs ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for _, p := range pairs {
			if key, value, _ := strings.Cut(p, "="); key == name {
				return value, true
			}
		}
		return "", false
	}
}

func file(content string) []File { return []File{{Name: "c.yaml", Data: []byte(content)}} }

func TestDefaults(t *testing.T) {
	v, err := Resolve(For(Server), Sources{})
	if err != nil {
		t.Fatal(err)
	}
	if DataDir.In(v) != "/var/lib/kedge" || HTTPSPort.In(v) != 6443 || KubeconfigMode.In(v) != 0o600 || AgentCertificateLife.In(v) != 720*time.Hour || Debug.In(v) || NodeLabels.In(v) != nil {
		t.Errorf("%q, %d, %o, %s, %v, %q", DataDir.In(v), HTTPSPort.In(v), KubeconfigMode.In(v), AgentCertificateLife.In(v), Debug.In(v), NodeLabels.In(v))
	}
	for _, row := range For(Both) {
		if v.IsSet(row.Name) {
			t.Errorf("%s is set", row.Name)
		}
	}
}

// TestPrecedence: the command line before the environment before the files, of which a later one counts.
func TestPrecedence(t *testing.T) {
	files := []File{{"a.yaml", []byte("node-name: file-a\nhttps-listen-port: 1\nkubelet-arg: [a=1]\ntls-san: [x, y]\n")}, {"b.yaml", []byte("node-name: file-b\nkubelet-arg+: [b=2]\n")}}
	v, err := Resolve(For(Server), Sources{
		Flags:     map[string][]string{"https-listen-port": {"3", "4"}, "node-label": {"a=b,c=d", "e=f"}},
		Variables: variables("KEDGE_HTTPS_LISTEN_PORT=2", "KEDGE_DEBUG=true", "KEDGE_NODE_TAINT=a=b:NoSchedule", "KEDGE_KUBELET_PORT=", "KEDGE_DISABLE_AGENT=", "KEDGE_LOG_LEVEL="),
		Files:     files,
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ got, want any }{
		"flag":     {HTTPSPort.In(v), uint16(4)},
		"variable": {Debug.In(v), true},
		"file":     {NodeName.In(v), "file-b"},
		"appended": {KubeletArgs.In(v), []string{"a=1", "b=2"}},
		"list":     {TLSSANs.In(v), []string{"x", "y"}},
		"commas":   {NodeLabels.In(v), []string{"a=b", "c=d", "e=f"}},
		"one":      {NodeTaints.In(v), []string{"a=b:NoSchedule"}},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("%s: %v, want %v", name, c.got, c.want)
		}
	}
}

// TestVerbatim: values for components of upstream contain commas.
func TestVerbatim(t *testing.T) {
	v, err := Resolve(For(Agent), Sources{Flags: map[string][]string{"kubelet-arg": {"feature-gates=A=true,B=false"}}})
	if err != nil || !slices.Equal(KubeletArgs.In(v), []string{"feature-gates=A=true,B=false"}) {
		t.Errorf("%q, %v", KubeletArgs.In(v), err)
	}
}

func TestMistakes(t *testing.T) {
	for text, want := range map[string]string{
		"--https-listen-port=abc":                   `--https-listen-port: "abc" is not a whole number`,
		"--https-listen-port=99999":                 "--https-listen-port 99999 is not between 1 and 65535",
		"--debug=perhaps":                           `--debug: "perhaps" is neither true nor false`,
		"--agent-certificate-life=soon":             `--agent-certificate-life: "soon" is not a duration such as 30s or 5m`,
		"--write-kubeconfig-mode=rw":                `--write-kubeconfig-mode "rw" is not an octal file mode such as 600`,
		"--node-ip=1.2.3":                           `--node-ip "1.2.3" is not an IP address`,
		"--node-ip=192.0.2.1,2001:db8::1,192.0.2.2": "--node-ip 192.0.2.2 is of the same family as 192.0.2.1; give at most one IPv4 and one IPv6",
		"--server=s1":                               `--server "s1" is not like https://HOST:6443`,
		"--bind-address=x":                          `--bind-address "x" is not an IP address`,
		"--cluster-cidr=10.42.0.0/16,nonsense":      `--cluster-cidr "nonsense" is not a range such as 10.42.0.0/16`,
		"--service-node-port-range=70000":           `--service-node-port-range "70000" is not a range of ports such as 30000-32767`,
		"--log-level=loud":                          `--log-level: invalid log level "loud"; use trace, debug, info, warn or error`,
		"--log-format=jsn":                          `--log-format "jsn" must be one of text, json; did you mean "json"?`,
		"--snapshotter=overlay":                     `--snapshotter "overlay" must be one of overlayfs, native; did you mean "overlayfs"?`,
		"--flannel-backend=gre":                     `--flannel-backend "gre" must be one of vxlan, host-gw, wireguard, udp, none`,
		"--disable=cordns":                          `--disable "cordns" must be one of coredns, dns, servicelb; did you mean "coredns"?`,
		"--node-name=a_b":                           `--node-name "a_b": it has the character '_'; want at most 63 letters, digits, dots and dashes`,
		"--node-name=a.b.":                          `--node-name "a.b.": a dot must stand between letters or digits; want at most 63 letters, digits, dots and dashes`,
		"--data-dir=":                               "--data-dir is empty",
		"--config=":                                 "--config is empty",
	} {
		name, value, _ := strings.Cut(strings.TrimPrefix(text, "--"), "=")
		_, err := Resolve(For(Server), Sources{Flags: map[string][]string{name: {value}}})
		if err == nil || err.Error() != want || errorkind.ExitCode(err) != errorkind.ExitUsage {
			t.Errorf("%s gives %v (exit code %d), want %s", text, err, errorkind.ExitCode(err), want)
		}
	}
}

// TestPlaces: a mistake is told with the place where the setting was made, and the exit code says whether that stays so.
func TestPlaces(t *testing.T) {
	_, err := Resolve(For(Server), Sources{
		Flags:     map[string][]string{"node-ip": {"y"}},
		Variables: variables("KEDGE_LOG_LEVEL=silent", "KEDGE_NODE_IP=z"),
		Files:     file("cluster-cidr:\n- 10.42.0.0/16\n- nonsense\ndebug: perhaps\n"),
	})
	want := strings.Join([]string{
		`KEDGE_LOG_LEVEL: invalid log level "silent"; use trace, debug, info, warn or error`,
		`c.yaml:4: debug: "perhaps" is neither true nor false`,
		`--node-ip "y" is not an IP address`,
		`c.yaml:3: cluster-cidr "nonsense" is not a range such as 10.42.0.0/16`,
	}, "\n")
	if err == nil || err.Error() != want || errorkind.ExitCode(err) != errorkind.ExitConfig {
		t.Errorf("exit code %d and\n%v\nwant\n%s", errorkind.ExitCode(err), err, want)
	}
}

// TestExplain: the same for what other packages find wrong, alone, joined, and with a mark.
func TestExplain(t *testing.T) {
	v, err := Resolve(For(Server), Sources{Variables: variables("KEDGE_TOKEN_FILE=/x"), Files: file("service-cidr: 10.42.0.0/16\nnode-label: [a=b, c]\n")})
	if err != nil {
		t.Fatal(err)
	}
	overlap := errorkind.BadSettings("cluster-cidr", "10.42.0.0/16", "service-cidr", " 10.42.0.0/16 overlap")
	label := errorkind.BadItem("node-label", "c", " %q: want KEY=VALUE", "c")
	token := errorkind.BadSetting("token", ": too short")
	plain := os.ErrNotExist
	for _, c := range []struct {
		in   error
		want string
		code int
	}{
		{overlap, "c.yaml:1: --cluster-cidr 10.42.0.0/16 and service-cidr 10.42.0.0/16 overlap", errorkind.ExitConfig},
		{label, `c.yaml:2: node-label "c": want KEY=VALUE`, errorkind.ExitConfig},
		{token, "KEDGE_TOKEN_FILE: too short", errorkind.ExitConfig},
		{errorkind.BadSetting("peer-port", " 0 is wrong"), "--peer-port 0 is wrong", errorkind.ExitUsage},
		{errorkind.BadUsage(joined(label, token)), "c.yaml:2: node-label \"c\": want KEY=VALUE\nKEDGE_TOKEN_FILE: too short", errorkind.ExitConfig},
		{plain, plain.Error(), errorkind.ExitFailure},
	} {
		got := v.Explain(c.in)
		if got.Error() != c.want || errorkind.ExitCode(got) != c.code {
			t.Errorf("%v gives exit code %d and %q, want %d and %q", c.in, errorkind.ExitCode(got), got, c.code, c.want)
		}
	}
	if v.Explain(nil) != nil {
		t.Error("nil is no mistake")
	}
}

type many []error

func joined(errs ...error) error   { return many(errs) }
func (m many) Unwrap() []error     { return m }
func (m many) Error() (out string) { return joinText(m) }
func joinText(errs []error) string {
	var lines []string
	for _, e := range errs {
		lines = append(lines, e.Error())
	}
	return strings.Join(lines, "\n")
}

func TestFileMistakes(t *testing.T) {
	for content, want := range map[string]string{
		"debug: true\nnode-nmae: x\n":                `c.yaml:2: unknown key "node-nmae"; did you mean "node-name"?`,
		"zzzzzzzz: x\n":                              `c.yaml:1: unknown key "zzzzzzzz"`,
		"config: x\n":                                `c.yaml:1: unknown key "config"`,
		"cluster-init: true\n":                       "c.yaml:1: cluster-init is a setting of k3s that kedge does not have: ",
		"tls-san:\n\t- a\n":                          "c.yaml:2:1: not valid YAML: tab in the indentation",
		"a:\n -\tb: c\n\td: e\n":                     "c.yaml:2:3: not valid YAML: tab in the indentation",
		"node-name: [a, b]\n":                        "c.yaml:1: node-name: want one value",
		"kubelet-arg: {a: b}\n":                      "c.yaml:1: kubelet-arg: want a value or a list of values",
		"kubelet-arg: [{a: b}]\n":                    "c.yaml:1: kubelet-arg: want a list of plain values",
		"node-name+: a\n":                            `c.yaml:1: "node-name" takes one value, so "+" cannot append to it`,
		"debug: true\n# x\ndebug: false\n":           "c.yaml:3: debug is already set in line 1; set it once",
		"kubelet-arg: [a]\nkubelet-arg+: [b]\n":      "c.yaml:2: kubelet-arg is already set in line 1; set it once",
		"node-name: a\n---\ndebug: true\n":           "c.yaml:3: a second YAML document begins here; a file can have only one, so remove the line \"---\"",
		"---\nnode-name: a\n---\n---\ndebug: true\n": "c.yaml:5: a second YAML document",
		"debug: true\n---\na: b: c\n":                "c.yaml:3: not valid YAML: ",
		"- a\n":                                      "c.yaml:1: want lines of the form \"flag: value\"",
		"# x\na: b: c\n":                             "c.yaml:2: not valid YAML: ",
		"# x\nnode-label: [a\ndebug: true\n":         "c.yaml:2: not valid YAML: ",
	} {
		_, err := Resolve(For(Server), Sources{Files: file(content)})
		if err == nil || !strings.Contains(err.Error(), want) || errorkind.ExitCode(err) != errorkind.ExitConfig {
			t.Errorf("%q gives %v (exit code %d), want %q", content, err, errorkind.ExitCode(err), want)
		}
	}
}

func TestEmptyDocuments(t *testing.T) {
	for _, content := range []string{"", "# nothing\n", "---\n", "---\nnode-name: a\n", "node-name: a\n---\n# nothing more\n", "node-name: a\n...\n"} {
		v, err := Resolve(For(Server), Sources{Files: file(content)})
		if err != nil || strings.Contains(content, "name") != (NodeName.In(v) == "a") {
			t.Errorf("%q gives %q, %v", content, NodeName.In(v), err)
		}
	}
}

func TestReadFiles(t *testing.T) {
	dir := t.TempDir()
	path := write(t, dir, "config.yaml", "node-name: a\n")
	write(t, dir, "config.yaml.d/20.yaml", "debug: true\n")
	write(t, dir, "config.yaml.d/10.yaml", "debug: false\n")
	write(t, dir, "config.yaml.d/30.txt", "rubbish: [")
	files, err := ReadFiles(path, false)
	if err != nil || len(files) != 3 || !strings.HasSuffix(files[1].Name, "10.yaml") || string(files[2].Data) != "debug: true\n" {
		t.Errorf("%v, %v", files, err)
	}
	missing := filepath.Join(dir, "none.yaml")
	if files, err := ReadFiles(missing, false); err != nil || len(files) != 0 {
		t.Errorf("the default file may be missing: %v, %v", files, err)
	}
	if _, err := ReadFiles(missing, true); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("a file that the user named may not be missing: %v", err)
	}
	if files, err := ReadFiles(os.DevNull, true); err != nil || len(files) != 0 {
		t.Errorf("/dev/null: %v, %v", files, err)
	}
}

// A device and a pipe have no end, and a large file is no configuration.
func TestReadFilesRefusesOtherFiles(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	large := write(t, dir, "large", strings.Repeat("#\n", maxFile/2+1))
	for path, want := range map[string]string{"/dev/zero": "not a regular file", pipe: "not a regular file", dir: "not a regular file", large: "larger than 1024 KiB"} {
		if _, err := ReadFiles(path, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := ReadFiles(write(t, dir, "fits", strings.Repeat("#\n", maxFile/2)), true); err != nil {
		t.Error(err)
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

func TestUnknownVariables(t *testing.T) {
	got := Unknown([]string{"PATH=/", "KEDGE_NODE_LABLE=a", "KEDGE_NODE_NAME=b", "KEDGE_FOO=c", "KEDGE_LAUNCHER=d"}, For(Both), "KEDGE_LAUNCHER")
	want := []string{
		"the environment variable KEDGE_NODE_LABLE is not a setting of kedge and has no effect; did you mean KEDGE_NODE_LABEL?",
		"the environment variable KEDGE_FOO is not a setting of kedge and has no effect",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestCluster(t *testing.T) {
	v, err := Resolve(For(Server), Sources{Flags: map[string][]string{
		"disable": {"coredns", "traefik"}, "service-cidr": {"10.50.0.0/16"}, "flannel-backend": {"wireguard-native"}, "lb-pool": {"192.0.2.0/28"}, "disable-kube-proxy": {"true"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	want := joining.Cluster{
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.50.0.0/16")},
		ClusterDNS: []netip.Addr{netip.MustParseAddr("10.50.0.10")}, ClusterDomain: "cluster.local", Backend: "wireguard", Pools: []string{"192.0.2.0/28"},
		NoDNS: true, NoProxy: true,
	}
	if got := v.Cluster(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := v.Absent(); !slices.Equal(got, []string{"traefik"}) {
		t.Errorf("absent are %q", got)
	}
	if errs := v.Contradictions(want); errs != nil {
		t.Errorf("a server with the same settings: %v", errs)
	}
}

// TestContradictions: a server that joins may leave a setting out, and may not have another value. Each setting that is
// kept among the cluster's is tried, so that a new one cannot be forgotten.
func TestContradictions(t *testing.T) {
	other := map[string]string{
		"disable": "servicelb", "cluster-cidr": "10.99.0.0/16", "service-cidr": "10.98.0.0/16", "cluster-dns": "10.43.0.53", "cluster-domain": "example.org",
		"lb-pool": "192.0.2.0/28", "flannel-backend": "host-gw", "flannel-external-ip": "true", "disable-network-policy": "true", "disable-kube-proxy": "true",
	}
	plain, err := Resolve(For(Server), Sources{})
	if err != nil {
		t.Fatal(err)
	}
	have, tried := plain.Cluster(), 0
	for _, row := range For(Server) {
		if row.shared == nil {
			continue
		}
		tried++
		v, err := Resolve(For(Server), Sources{Flags: map[string][]string{row.Name: {other[row.Name]}}})
		if err != nil {
			t.Fatal(err)
		}
		errs := v.Contradictions(have)
		if len(errs) != 1 || !strings.HasPrefix(errs[0].Error(), "--"+row.Name+" ") || !strings.HasSuffix(errs[0].Error(), "; leave it out") {
			t.Errorf("%s=%s: %v", row.Name, other[row.Name], errs)
		}
	}
	if tried != len(other) {
		t.Errorf("%d settings are alike in a cluster, and %d were tried", tried, len(other))
	}
	if errs := plain.Contradictions(have); errs != nil {
		t.Errorf("without settings: %v", errs)
	}
}

// TestRows: what follows from the rows rests on this.
func TestRows(t *testing.T) {
	seen := map[string]bool{}
	var categories []Category
	for _, row := range For(Both) {
		if n := len(categories); n == 0 || categories[n-1] != row.Category {
			categories = append(categories, row.Category)
		}
		for _, name := range row.Names() {
			if seen[name] {
				t.Errorf("%s is there twice", name)
			}
			seen[name] = true
		}
		if row.Help == "" || row.Category == "" || row.Roles == 0 || row.read == nil {
			t.Errorf("%s lacks help, category, role or kind", row.Name)
		}
		if why, ok := OnlyK3s(row.Name); ok {
			t.Errorf("%s is listed as a setting that only k3s has: %s", row.Name, why)
		}
	}
	if want := []Category{General, Node, Network, API, Datastore, Joining, Snapshots, Upstream}; !slices.Equal(categories, want) {
		t.Errorf("the categories come as %q, want %q: no row may need a variable of the package", categories, want)
	}
	for _, row := range For(Agent) {
		if row.shared != nil {
			t.Errorf("%s is alike in a cluster, so an agent has it from its server and not from its own settings", row.Name)
		}
	}
	if got := helpOf(For(Agent), "token"); got == helpOf(For(Server), "token") || got == "" {
		t.Errorf("an agent's help for token is %q", got)
	}
}

func helpOf(rows []*Setting, name string) string {
	for _, row := range rows {
		if row.Name == name {
			return row.Help
		}
	}
	return ""
}

// TestNewRow adds a setting and sees it everywhere: that is all there is to do.
func TestNewRow(t *testing.T) {
	level := Number(Setting{Name: "new-level", Category: Node, Roles: Server, Default: "5", Help: "`LEVEL`"})
	rows := append(For(Server), level.Setting)
	for name, from := range map[string]Sources{
		"flag": {Flags: map[string][]string{"new-level": {"7"}}}, "variable": {Variables: variables("KEDGE_NEW_LEVEL=7")}, "key": {Files: file("new-level: 7\n")},
	} {
		if v, err := Resolve(rows, from); err != nil || level.In(v) != 7 {
			t.Errorf("%s: %d, %v", name, level.In(v), err)
		}
	}
	if v, err := Resolve(rows, Sources{}); err != nil || level.In(v) != 5 || level.IsSet(v) {
		t.Errorf("default: %d, %v", level.In(v), err)
	}
	if _, err := Resolve(rows, Sources{Files: file("new-levle: 7\n")}); err == nil || !strings.Contains(err.Error(), `did you mean "new-level"`) {
		t.Errorf("a mistyped key: %v", err)
	}
}

func FuzzFile(f *testing.F) {
	f.Add([]byte("node-name: a\nkubelet-arg+: [b]\n"))
	f.Add([]byte("a: &x [*x]\n"))
	f.Fuzz(func(_ *testing.T, data []byte) {
		_, _ = Resolve(For(Server), Sources{Files: []File{{"f", data}}})
	})
}

// TestWritten: each setting with the place where it was made.
func TestWritten(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(file, []byte("# x\nnode-label: [a=b, c=d]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	files, err := ReadFiles(file, true)
	if err != nil {
		t.Fatal(err)
	}
	v, err := Resolve(For(Server), Sources{
		Flags: map[string][]string{"node-name": {"edge"}}, Files: files,
		Variables: func(name string) (string, bool) { return "debug", name == "KEDGE_LOG_LEVEL" },
	})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]Written{}
	for _, w := range v.Written() {
		got[w.Name] = w
	}
	for _, want := range []Written{
		{"node-name", []string{"edge"}, "command line"}, {"log-level", []string{"debug"}, "KEDGE_LOG_LEVEL"},
		{"node-label", []string{"a=b", "c=d"}, file + ":2"}, {"kubelet-port", []string{"10250"}, "default"}, {"token", nil, "default"},
	} {
		if !reflect.DeepEqual(got[want.Name], want) {
			t.Errorf("%+v, want %+v", got[want.Name], want)
		}
	}
	if len(got) != len(For(Server)) {
		t.Errorf("%d settings of %d", len(got), len(For(Server)))
	}
}

// TestMade: what was given outside of files, in the form in which a file can have it.
func TestMade(t *testing.T) {
	rows := []*Setting{NodeName.Row(), NodeLabels.Row(), KubeletArgs.Row(), Debug.Row(), Config.Row(), LogLevel.Row()}
	v, err := Resolve(rows, Sources{
		Flags:     map[string][]string{"node-label": {"a=b,c=d", "e=f"}, "kubelet-arg": {"v=1,2"}, "debug": {"true"}},
		Variables: variables("KEDGE_NODE_NAME=n1", "KEDGE_CONFIG=/x"),
		Files:     file("log-level: debug\nnode-name: other\n"),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []Made{
		{Name: "node-name", Items: []string{"n1"}},
		{Name: "node-label", Items: []string{"a=b", "c=d", "e=f"}, List: true},
		{Name: "kubelet-arg", Items: []string{"v=1,2"}, List: true},
		{Name: "debug", Items: []string{"true"}},
		{Name: "config", Items: []string{"/x"}, NoKey: true},
	}
	if got := v.Made(); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if items, origin := v.ItemsOf("log-level"); len(items) != 1 || items[0] != "debug" || origin != (Origin{File: "c.yaml", Line: 1}) {
		t.Errorf("%v from %+v", items, origin)
	}
}
