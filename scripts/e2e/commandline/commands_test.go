package commandline

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestSettings: a flag wins over the environment, that over the file, and "+" in a
// drop-in adds to what came before.
func TestSettings(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--cluster-domain=from.flag")
	files := map[string]string{
		"config.yaml":               "cluster-domain: from.file\nservice-node-port-range: 31000-31999\nnode-label: [from=file, one=1]\nlog-format: text\nkubelet-arg: [max-pods=11]\n",
		"config.yaml.d/10-a.yaml":   "service-node-port-range: 32000-32100\nnode-label+: [two=2]\nkubelet-arg+: [pods-per-core=3]\n",
		"config.yaml.d/20-b.yaml":   "node-label+: three=3\n",
		"config.yaml.d/ignored.yml": "no such key: 1\n",
	}
	for name, text := range files {
		path := filepath.Join(n.Dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	n.Env = append(harness.BareEnv(), "KEDGE_CLUSTER_DOMAIN=from.env", "KEDGE_LOG_FORMAT=json")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	config := n.Kubectl(t, "get", "--raw", "/api/v1/nodes/"+n.Name+"/proxy/configz")
	for _, want := range []string{`"clusterDomain":"from.flag"`, `"maxPods":11`, `"podsPerCore":3`} {
		if !strings.Contains(config, want) {
			t.Errorf("the kubelet has no %s: %s", want, config)
		}
	}
	labels := n.Kubectl(t, "get", "node", n.Name, "-o", "jsonpath={.metadata.labels}")
	for _, want := range []string{`"from":"file"`, `"one":"1"`, `"two":"2"`, `"three":"3"`} {
		if !strings.Contains(labels, want) {
			t.Errorf("the node has no label %s: %s", want, labels)
		}
	}
	if lines := n.LogLines(t, `"msg":"kedge starts"`); len(lines) != 1 {
		t.Errorf("the log is not in JSON:\n%s", n.Tail(5))
	}
	ns := n.Namespace(t)
	out, err := n.TryKubectl(nil, "create", "service", "nodeport", "s", "-n", ns, "--tcp=80", "--node-port=31500")
	if err == nil || !strings.Contains(out, "32000-32100") {
		t.Errorf("a node port outside of the drop-in's range: %v\n%s", err, out)
	}

	t.Run("status", func(t *testing.T) { testStatus(t, n) })
	t.Run("check", func(t *testing.T) { testCheck(t, n) })
	t.Run("kubectl by name", func(t *testing.T) {
		link := filepath.Join(n.Dir, "kubectl")
		if err := os.Symlink(harness.Binary(), link); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ args, want string }{
			{"get node -o name", "node/" + n.Name + "\n"},
			{"version --client -o json", `"gitVersion": "v1.`},
		} {
			cmd := exec.Command(link, strings.Fields(c.args)...)
			cmd.Env = append(os.Environ(), "KUBECONFIG="+n.Kubeconfig)
			if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), c.want) {
				t.Errorf("kubectl %s: %v\n%s", c.args, err, out)
			}
		}
		cmd := exec.Command(link, "get", "no-such-things")
		cmd.Env = append(os.Environ(), "KUBECONFIG="+n.Kubeconfig)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || string(out) != "error: the server doesn't have a resource type \"no-such-things\"\n" {
			t.Errorf("%v: %s", err, out)
		}
	})
}

func testStatus(t *testing.T, n *harness.Node) {
	table, err := n.Run("status", "--run-dir="+n.RunDir())
	if err != nil {
		t.Fatalf("%v\n%s", err, table)
	}
	if !regexp.MustCompile(`^kedge \S+, node ` + n.Name + `, process \d+, up \d+s, memory \d+ MiB \(\d+ MiB anonymous\)\n\nCOMPONENT +STATE +FOR +WAITED FOR +READY AFTER +DETAIL +PROBLEM\n`).MatchString(table) {
		t.Errorf("the table begins\n%s", table)
	}
	out, err := n.Run("status", "-o", "json", "--run-dir="+n.RunDir())
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var report struct {
		Node       string
		PID        int
		Started    time.Time
		Memory     struct{ Resident, Anonymous int64 }
		Components []struct {
			Name, State, Took, Error string
			After                    []string
		}
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatal(err)
	}
	if report.Node != n.Name || report.PID != n.Cmd.Process.Pid || time.Since(report.Started) > 10*time.Minute || report.Memory.Resident < 50<<20 || len(report.Components) < 10 {
		t.Errorf("report %s", out)
	}
	for _, c := range report.Components {
		if c.State != "ready" || c.Error != "" || c.Took == "" {
			t.Errorf("component %+v", c)
		}
		if !strings.Contains(table, "\n"+c.Name+" ") {
			t.Errorf("%s is not in the table:\n%s", c.Name, table)
		}
	}
}

// testCheck: the machine is good, also beside the node itself, which has its ports.
func testCheck(t *testing.T, n *harness.Node) {
	out, err := n.Command("check", "-o", "json")
	if err != nil {
		t.Error(err)
	}
	var results []struct{ Check, Level, Message, Remedy string }
	if err := json.Unmarshal([]byte(out), &results); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if len(results) < 15 {
		t.Errorf("only %d results: %s", len(results), out)
	}
	for _, r := range results {
		if r.Message == "" || r.Level != "ok" && r.Remedy == "" || r.Level == "error" {
			t.Errorf("result %+v", r)
		}
	}
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish"} {
		script, err := exec.Command(harness.Binary(), "completion", shell).Output()
		if err != nil {
			t.Fatalf("%s: %v", shell, err)
		}
		program, err := exec.LookPath(shell)
		if err != nil {
			t.Logf("no %s here: its script is not parsed", shell)
			continue
		}
		cmd := exec.Command(program, "-n")
		cmd.Stdin = strings.NewReader(string(script))
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", shell, err, out)
		}
		if shell != "bash" {
			continue
		}
		for _, c := range []struct{ words, want string }{
			{"kedge serve", "server"},
			{"kedge server --https-l", "--https-listen-port"},
			{"kedge server --debug --data-dir /x --cluster-do", "--cluster-domain"},
			{"kedge images ex", "export"},
			{"kedge images ls --run", "--run-dir"},
			{"kedge kubectl descr", "describe"},
		} {
			cmd := exec.Command(program, "--norc", "-c", string(script)+`
				COMP_WORDS=("$@"); COMP_WORDS[0]=`+harness.Binary()+`; COMP_CWORD=$(($#-1)); _kedge; printf '%s\n' "${COMPREPLY[@]}"`, "bash")
			cmd.Args = append(cmd.Args, strings.Fields(c.words)...)
			out, err := cmd.CombinedOutput()
			if err != nil || strings.TrimSpace(string(out)) != c.want {
				t.Errorf("%q is completed to %q, want %q: %v", c.words, out, c.want, err)
			}
		}
	}
}
