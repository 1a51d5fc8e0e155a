package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"kedge/appliance/doctor"
	"kedge/appliance/support"
	"kedge/internal/errorkind"
	"kedge/preflight"
	"kedge/settings"
)

// program is a Program that notes what it is asked for.
type program struct {
	Program

	node    *Node // of the last call of Server, Agent or KillAll
	called  string
	results []preflight.Result
	checked error
	report  doctor.Report
	fix     bool
}

func newProgram() *program {
	p := &program{}
	note := func(name string) func(context.Context, Node) error {
		return func(_ context.Context, n Node) error {
			p.called, p.node = name, &n
			return nil
		}
	}
	p.Program = Program{
		Version: "v1", Commit: "abc", Modules: []Module{{"Kubernetes", "v2"}, {"none", ""}},
		Server: note("server"), Agent: note("agent"), KillAll: note("killall"),
		Check: func(_ context.Context, n Node) ([]preflight.Result, bool, error) {
			p.node = &n
			return p.results, true, p.checked
		},
		Doctor: func(_ context.Context, n Node, fix bool) doctor.Report {
			p.node, p.fix = &n, fix
			return p.report
		},
		SupportBundle: func(_ context.Context, n Node, version string, w io.Writer) (support.Summary, error) {
			p.node = &n
			io.WriteString(w, version)
			return support.Summary{Files: []string{"version.txt"}, Missing: []string{"journal:\nnone"}}, p.checked
		},
		Kubectl:    func(args []string, _ string) int { return len(args) },
		Containers: Containers{Socket: func(dir string) string { return filepath.Join(dir, "none.sock") }},
	}
	return p
}

// run is the exit code of a command line, and what it prints.
func (p *program) run(line ...string) (code int, out, errOut string) {
	var o, e bytes.Buffer
	code = p.Run(context.Background(), append([]string{"kedge"}, line...), &o, &e)
	return code, o.String(), e.String()
}

func root(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("nodes are root's")
	}
}

func TestMistakesOfCommandLine(t *testing.T) {
	for line, want := range map[string]string{
		"serve":                               `unknown command "serve"; did you mean "server"?`,
		"frobnicate":                          `unknown command "frobnicate"; see "kedge help"`,
		"images imprt x":                      `unknown command "images imprt"; did you mean "images import"?`,
		"server now":                          `"kedge server" takes flags only, not "now"`,
		"check --config=/dev/null now":        `"kedge check" takes flags only, not "now"`,
		"support-bundle now":                  `"kedge support-bundle" takes flags only, not "now"`,
		"doctor now":                          `"kedge doctor" takes flags only, not "now"`,
		"doctor --config=/dev/null -o yaml":   `--output "yaml" is neither text nor json`,
		"killall node":                        `"kedge killall" takes flags only, not "node"`,
		"version now":                         `"kedge version" takes flags only, not "now"`,
		"status now":                          `"kedge status" takes flags only, not "now"`,
		"server ls s1":                        `"kedge server ls" takes flags only, not "s1"`,
		"token ls t1":                         `"kedge token ls" takes flags only, not "t1"`,
		"images ls x":                         `"kedge images ls" takes flags only, not "x"`,
		"node add n1":                         `"kedge node add" takes flags only, not "n1"`,
		"node add --role=boss":                `--role "boss" is neither agent nor server`,
		"completion bash zsh":                 `completion for "bash zsh": want bash, zsh or fish`,
		"server --data-dri=/x":                "unknown flag --data-dri; did you mean --data-dir?",
		"server --frobnicate":                 `unknown flag --frobnicate; see "kedge help server"`,
		"--frobnicate":                        `unknown flag --frobnicate; see "kedge help"`,
		"server --data-dir":                   `--data-dir needs a value; see "kedge help server"`,
		"server ls --run-dir":                 `--run-dir needs a value; see "kedge help server ls"`,
		"server --kine-tls":                   "--kine-tls is a flag of k3s that kedge does not have: the only external datastore that kedge supports is etcd; leave it out",
		"server --config=/dev/null --debug=x": `--debug: "x" is neither true nor false`,
		"status --output=yaml":                `--output "yaml" is neither table nor json`,
		"check --config=/dev/null -o yaml":    `--output "yaml" is neither text nor json`,
		"completion csh":                      `completion for "csh": want bash, zsh or fish`,
		"reference x":                         `reference of "x": want commands or configuration`,
		"help servr":                          `unknown command "servr"; did you mean "server"?`,
		"help server rmove":                   `unknown command "server rmove"; did you mean "server remove"?`,
		"token create --uses=many":            `--uses: "many" is not a whole number`,
		"token create --role=x --uses=0":      "--role \"x\" is none of agent, server and witness\n--uses 0 is not between 1 and 10000",
		"install servr":                       `unknown command "install servr"; did you mean "install server"?`,
		"install server now":                  `"kedge install server" takes flags only, not "now"`,
		"install agent --disable=dns":         `unknown flag --disable; see "kedge help install agent"`,
		"install agent --kubeconfig":          `unknown flag --kubeconfig; see "kedge help install agent"`,
		"install server --bin-dir=":           "--bin-dir is empty",
		"install server --links=none":         `--links "none" must be one of auto, skip, force`,
		"uninstall now":                       `"kedge uninstall" takes flags only, not "now"`,
		"uninstall --prge":                    "unknown flag --prge; did you mean --purge?",
		"kubeconfig create":                   "give the name of one user",
		"kubeconfig create system:node:a":     `"system:node:a" cannot be the name of a user: it is reserved for the cluster; choose a name that does not begin with "system:"`,
		"kubeconfig create a --group=system:x --ttl=1s":            "--group \"system:x\": it is reserved for the cluster; of the groups that begin with \"system:\" only system:masters can be given\n--ttl 1s is not between 1m0s and 43800h0m0s",
		"kubeconfig create a --output=/":                           "--output: / exists; remove it or choose another name",
		"kubeconfig revoke":                                        `give the name of one user; "kedge kubeconfig ls" shows those that have a kubeconfig`,
		"snapshot prune --config=/dev/null --snapshot-retention=0": `--snapshot-retention "0" is not a number of snapshots, at least 1; --snapshot-schedule=off takes none`,
		"snapshot ls --config=/dev/null --snapshot-dir=x":          `--snapshot-dir "x" is not an absolute path`,
		"snapshot save --name=scheduled":                           "--name scheduled is for the snapshots of the schedule, of which old ones are removed; choose another",
		"snapshot save --name=../x":                                `--name: "../x" cannot begin the name of a snapshot: use at most 100 letters, digits, dots, dashes and underscores`,
		"snapshot rm --config=/dev/null":                           `give the names of snapshots; "kedge snapshot ls" shows them`,
		"token rm":                                                 `give the ID of one token; "kedge token ls" shows them`,
		"node allow a b":                                           `give the name of one node; "kedge kubectl get nodes" shows them`,
		"server remove":                                            `give the name of one server; "kedge server ls" shows them`,
		"net trace":                                                "missing destination: give a service, a pod or an address",
		"up --port=x":                                              `--port "x" is not [ADDRESS:]PORT:NODEPORT`,
		"up now":                                                   `"kedge up" takes flags only, not "now"; a command is for --ephemeral`,
		"up --ephemeral":                                           "--ephemeral: give the command to run after --",
		"up --name=A_B --kubeconfig=/x":                            `invalid cluster name "A_B"; use at most 40 lower-case letters, digits and dashes`,
		"server --config=":                                         "--config is empty",
		"verify":                                                   "give one folder with the files of a release",
		"verify a b":                                               "give one folder with the files of a release",
	} {
		p := newProgram()
		code, out, got := p.run(strings.Fields(line)...)
		if code != errorkind.ExitUsage || got != "kedge: "+want+"\n" || out != "" || p.called != "" {
			t.Errorf("kedge %s: exit code %d, %q, want %q", line, code, got, want)
		}
	}
}

// TestNodes: what a node is run with, from all places of settings.
func TestNodes(t *testing.T) {
	root(t)
	dir := t.TempDir()
	config, token := filepath.Join(dir, "c.yaml"), filepath.Join(dir, "token")
	for path, content := range map[string]string{config: "node-label: [a=b]\ntoken-file: " + token + "\n", token: "  a-long-enough-secret\n"} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("KEDGE_NODE_LABLE", "x")
	t.Setenv("KEDGE_KUBELET_PORT", "10251")
	for _, name := range []string{"server", "agent", "killall"} {
		p := newProgram()
		code, _, errOut := p.run(name, "-c", config, "-d", dir, "--debug", "--node-name=edge")
		if code != 0 || p.called != name {
			t.Errorf("kedge %s: exit code %d, %s", name, code, errOut)
			continue
		}
		v := p.node.Values
		if settings.DataDir.In(v) != dir || !settings.Debug.In(v) || settings.NodeName.In(v) != "edge" || !slices.Equal(settings.NodeLabels.In(v), []string{"a=b"}) || settings.KubeletPort.In(v) != 10251 || p.node.Token != "a-long-enough-secret" {
			t.Errorf("kedge %s: %+v", name, p.node)
		}
		if want := "the environment variable KEDGE_NODE_LABLE is not a setting of kedge and has no effect; did you mean KEDGE_NODE_LABEL?"; !slices.Equal(p.node.Warnings, []string{want}) {
			t.Errorf("kedge %s warns %q", name, p.node.Warnings)
		}
	}
}

// TestMistakesOfNodes: the place of a setting is told, and the exit code says whether it stays wrong.
func TestMistakesOfNodes(t *testing.T) {
	root(t)
	dir := t.TempDir()
	config := filepath.Join(dir, "c.yaml")
	if err := os.WriteFile(config, []byte("log-level: loud\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := newProgram()
	if code, _, got := p.run("server", "--config="+config); code != errorkind.ExitConfig || got != "kedge: "+config+":1: log-level: invalid log level \"loud\"; use trace, debug, info, warn or error\n" {
		t.Errorf("exit code %d, %s", code, got)
	}
	if code, _, got := p.run("server", "--config="+filepath.Join(dir, "none")); code != errorkind.ExitConfig || !strings.Contains(got, "no such file") {
		t.Errorf("exit code %d, %s", code, got)
	}
	t.Setenv("KEDGE_TOKEN", "a-long-enough-secret")
	if code, _, got := p.run("server", "--config=/dev/null", "--token-file=/x"); code != errorkind.ExitConfig || got != "kedge: KEDGE_TOKEN and --token-file are both given; give one\n" {
		t.Errorf("exit code %d, %s", code, got)
	}
	p.Server = func(context.Context, Node) error { return errorkind.Permanent(errors.New("broken")) }
	if code, _, got := p.run("server", "--config=/dev/null"); code != errorkind.ExitConfig || got != "kedge: broken\n" {
		t.Errorf("exit code %d, %s", code, got)
	}
}

func TestCheckPrints(t *testing.T) {
	p := newProgram()
	p.results = []preflight.Result{{Check: "privileges", Level: preflight.Warning, Message: "few", Remedy: "add some"}}
	code, out, _ := p.run("check", "--config=/dev/null")
	if code != 0 || out != "warning  privileges: few; add some\n" {
		t.Errorf("exit code %d, %q", code, out)
	}
	p.checked = errors.New("not possible")
	code, out, errOut := p.run("check", "--config=/dev/null", "-o", "json")
	if code != errorkind.ExitFailure || !strings.Contains(out, `"check": "privileges"`) || errOut != "" {
		t.Errorf("exit code %d, %q, %q", code, out, errOut)
	}
}

func TestOtherPrograms(t *testing.T) {
	p := newProgram()
	if code, _, _ := p.run("kubectl", "get", "-A", "--unknown"); code != 3 {
		t.Errorf("kubectl's exit code is %d", code)
	}
	for _, line := range []string{"version", "--version", "-v"} {
		if code, out, _ := p.run(line); code != 0 || !strings.HasPrefix(out, "kedge v1 (abc)\nKubernetes v2\ndata format 1\ngo") {
			t.Errorf("%s: exit code %d, %q", line, code, out)
		}
	}
	if code, _, got := p.run("images", "ls", "--run-dir=/nowhere"); code != errorkind.ExitFailure || !strings.Contains(got, "kedge is not running with run directory /nowhere") {
		t.Errorf("exit code %d, %q", code, got)
	}
}

func TestVerifyNeedsRelease(t *testing.T) {
	dir := t.TempDir()
	code, out, got := newProgram().run("verify", dir)
	if code != errorkind.ExitFailure || out != "" || got != "kedge: "+dir+" has no file SHA256SUMS: it is not the folder of a release, or the release is not signed\n" {
		t.Errorf("exit code %d, %q, %q", code, out, got)
	}
}

func TestHelp(t *testing.T) {
	p := newProgram()
	for _, line := range []string{"help server", "server --help", "server -h"} {
		code, out, errOut := p.run(strings.Fields(line)...)
		if code != 0 || errOut != "" || !strings.Contains(out, "--data-dir DIR, -d DIR") || !strings.Contains(out, "(default: /var/lib/kedge) [$KEDGE_DATA_DIR]") {
			t.Errorf("%s: exit code %d %s\n%s", line, code, errOut, out)
		}
	}
	if code, out, _ := p.run("help", "server", "remove"); code != 0 || !strings.Contains(out, "Remove a server from the cluster") {
		t.Errorf("exit code %d, %s", code, out)
	}
}

func TestCompletion(t *testing.T) {
	p := newProgram()
	if _, out, _ := p.run("server", "--data-", completionFlag); out != "--data-dir\n" {
		t.Errorf("flags: %q", out)
	}
	before := os.Args // where the library looks
	defer func() { os.Args = before }()
	os.Args = []string{"kedge", "token", completionFlag}
	if _, out, _ := p.run("token", completionFlag); !strings.Contains(out, "create\n") {
		t.Errorf("commands: %q", out)
	}
}

// TestReference: each setting of a server is on the page of the configuration, and each command on the other.
func TestReference(t *testing.T) {
	p := newProgram()
	_, out, _ := p.run("reference", "configuration")
	for _, row := range settings.For(settings.Server) {
		if !strings.Contains(out, "| `"+row.Name+"`") || !strings.Contains(out, "`"+row.Variable()+"`") {
			t.Errorf("%s is missing", row.Name)
		}
	}
	_, out, _ = p.run("reference", "commands")
	for _, want := range []string{"## kedge server\n", "## kedge node shell\n", "Accepts the settings of the [configuration](configuration.md).", "| `--output`, `-o` | `text` | FORMAT: text or json |"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing in\n%s", want, out)
		}
	}
}

// seen is what an action was called with.
type seen struct {
	name  string
	all   bool
	where string
	args  []string
}

func arranged(s *seen) *cli.App {
	act := func(name string, all settings.Of[bool], where settings.Of[string]) func(*call) error {
		return func(c *call) error {
			*s = seen{name: name, all: all.In(c.values), where: where.In(c.values), args: c.args}
			return nil
		}
	}
	command := func(name string, aliases ...string) *cli.Command {
		all := settings.Switch(settings.Setting{Name: "all", Short: "a", NoVar: true})
		where := settings.Text(settings.Setting{Name: "where", Short: "w", NoVar: true})
		return leaf(cli.Command{Name: name, Aliases: aliases, ArgsUsage: "[WORD...]"}, rowsOf(all, where), act(name, all, where))
	}
	return &cli.App{Name: "x", Writer: io.Discard, ErrWriter: io.Discard, Commands: []*cli.Command{
		command("flat"),
		{Name: "deep", Subcommands: []*cli.Command{command("leaf", "l")}},
		{Name: "raw", SkipFlagParsing: true, Action: func(c *cli.Context) error {
			*s = seen{name: "raw", args: c.Args().Slice()}
			return nil
		}},
	}}
}

func TestArrange(t *testing.T) {
	for line, want := range map[string]seen{
		"flat one two":                     {"flat", false, "", []string{"one", "two"}},
		"flat one --all two --where=h":     {"flat", true, "h", []string{"one", "two"}},
		"flat one --where here -a two":     {"flat", true, "here", []string{"one", "two"}},
		"flat --where here one -a":         {"flat", true, "here", []string{"one"}},
		"flat one -a=false -w=h":           {"flat", false, "h", []string{"one"}},
		"flat -a one -- --where two":       {"flat", true, "", []string{"one", "--", "--where", "two"}},
		"flat one - -w -":                  {"flat", false, "-", []string{"one", "-"}},
		"deep leaf one --where here":       {"leaf", false, "here", []string{"one"}},
		"deep l one -w here":               {"leaf", false, "here", []string{"one"}},
		"raw one --where here":             {"raw", false, "", []string{"one", "--where", "here"}},
		"flat one --where one --where two": {"flat", false, "two", []string{"one"}},
	} {
		var got seen
		app := arranged(&got)
		args := strings.Fields("x " + line)
		before := slices.Clone(args)
		out, err := reorderFlags(app, args)
		if err == nil {
			err = app.Run(out)
		}
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if got.name != want.name || got.all != want.all || got.where != want.where || !slices.Equal(got.args, want.args) {
			t.Errorf("%s: %+v, want %+v", line, got, want)
		}
		if !slices.Equal(args, before) {
			t.Errorf("%s: the words were changed to %q", line, args)
		}
	}
}

func TestArrangeLeavesAlone(t *testing.T) {
	for _, line := range []string{"nothing one --all", "deep", "deep nothing --all", "flat one --generate-bash-completion", ""} {
		args := strings.Fields("x " + line)
		if got, err := reorderFlags(arranged(&seen{}), args); err != nil || !slices.Equal(got, args) {
			t.Errorf("%s: %q, %v", line, got, err)
		}
	}
}

func TestParsePort(t *testing.T) {
	for text, want := range map[string]string{
		"80:30080": "127.0.0.1:80 30080", "192.0.2.1:80:30080": "192.0.2.1:80 30080", "[::1]:80:30080": "[::1]:80 30080",
		"80": "", "80:0": "", "0:80": "", "x:80": "", "a:80:80": "", "80:70000": "",
	} {
		p, err := parsePort(text)
		got := ""
		if err == nil {
			got = fmt.Sprint(p.Listen, " ", p.To)
		}
		if got != want {
			t.Errorf("%q is %q, %v, want %q", text, got, err, want)
		}
	}
}
