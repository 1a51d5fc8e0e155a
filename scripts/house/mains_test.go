package house

import (
	"crypto/sha256"
	"encoding/hex"
	"go/ast"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"kedge/internal/test/upstream"
)

// kedge assembles Kubernetes' components and does not run their programs. What these
// programs import for its side effects, and set up before they run the component, is
// therefore kedge's to do. When a test here fails after a bump of Kubernetes, read what
// has changed upstream, do in kedge what it asks for, and update the table.

// sideEffects are packages that upstream's programs import for their side effects, and
// kedge leaves out.
var sideEffects = map[string]string{
	"k8s.io/component-base/logs/json/register": "kedge's log has its own JSON format (internal/logging)",
}

func TestUpstreamSideEffectsAreOurs(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "kedge").Output()
	if err != nil {
		t.Fatalf("list what kedge links: %v", err)
	}
	ours := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		ours[strings.TrimSpace(line)] = true
	}
	seen := map[string]bool{}
	for _, program := range []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"} {
		for _, of := range []string{"", "/app", "/app/options"} {
			for _, path := range blankImports(t, "k8s.io/kubernetes/cmd/"+program+of) {
				seen[path] = true
				if _, left := sideEffects[path]; !ours[path] && !left {
					t.Errorf("%s imports %s for its side effects; import it in an embed file of server or agent, or say in sideEffects why not", program, path)
				}
			}
		}
	}
	for path := range sideEffects {
		if !seen[path] {
			t.Errorf("no program of upstream's imports %s any more; take it out of sideEffects", path)
		}
		if ours[path] {
			t.Errorf("kedge links %s; take it out of sideEffects", path)
		}
	}
	if len(seen) < 5 {
		t.Errorf("found %d imports only: %v", len(seen), seen)
	}
}

func blankImports(t *testing.T, path string) []string {
	t.Helper()
	var out []string
	for _, f := range upstream.Parse(t, path).Files {
		for _, i := range f.Imports {
			if i.Name != nil && i.Name.Name == "_" {
				p, err := strconv.Unquote(i.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				out = append(out, p)
			}
		}
	}
	return out
}

// setups are the functions of upstream's programs that run before the component does:
// their digests, and where kedge does what they do.
var setups = []struct{ path, function, digest, ours string }{
	{"k8s.io/kubernetes/cmd/kube-apiserver", "main", "a745ff43f4e17dc5", "main"},
	{"k8s.io/kubernetes/cmd/kube-controller-manager", "main", "fcf42717e31c335f", "main"},
	{"k8s.io/kubernetes/cmd/kube-scheduler", "main", "9f71351f6f7d1f3f", "main"},
	{"k8s.io/kubernetes/cmd/kubelet", "main", "4b01faa8901fc60f", "main"},
	{"k8s.io/kubernetes/cmd/kube-apiserver/app", "NewAPIServerCommand", "03bde52b780d8416", "flags and feature gates: server/embed_args.go, server/embed_features.go; no warnings of the loopback client: server/loopback"},
	{"k8s.io/kubernetes/cmd/kube-apiserver/app", "Run", "437a90ba7d201a12", "server/embed_apiserver.go"},
	{"k8s.io/kubernetes/cmd/kube-controller-manager/app", "NewControllerManagerCommand", "66cec74ef09ad172", "server/embed_controllers.go"},
	{"k8s.io/kubernetes/cmd/kube-controller-manager/app", "Run", "33fab373da5b19d9", "server/embed_controllers.go, without leader election"},
	{"k8s.io/kubernetes/cmd/kube-scheduler/app", "NewSchedulerCommand", "d8daf41ec93acec9", "server/embed_scheduler.go"},
	{"k8s.io/kubernetes/cmd/kube-scheduler/app", "Run", "c6ca54d1c77ae6fd", "server/embed_scheduler.go, without leader election"},
	{"k8s.io/kubernetes/cmd/kubelet/app", "NewKubeletCommand", "d41513b6cb0d158a", "agent/embed_args.go, agent/embed_kubelet.go"},
	{"k8s.io/kubernetes/cmd/kubelet/app", "Run", "326c2a6adf593224", "agent/embed_kubelet.go calls it"},
	{"k8s.io/component-base/cli", "run", "dfc650a75c7dc5c1", "internal/logging; what it does to flags is for cobra"},
}

func TestUpstreamMainsSetUpWhatWeKnow(t *testing.T) {
	sources := map[string]upstream.Source{}
	for _, s := range setups {
		source, ok := sources[s.path]
		if !ok {
			source = upstream.Parse(t, s.path)
			sources[s.path] = source
		}
		var decl ast.Node = source.Func(t, s.function, "upstream has renamed it: find what sets the program up now, and change the table setups")
		sum := sha256.Sum256([]byte(source.Text(t, decl)))
		if got := hex.EncodeToString(sum[:8]); got != s.digest {
			t.Errorf("%s.%s has changed (%s, was %s): compare it with the version before, do here what it newly sets up (%s), and update the digest", s.path, s.function, got, s.digest, s.ours)
		}
	}
}
