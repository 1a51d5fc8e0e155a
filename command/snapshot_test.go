package command

import (
	"os"
	"path/filepath"
	"testing"
)

// TestSnapshotsOfAConfiguredNode: the commands take a node's configuration file, which has settings that they do not need.
func TestSnapshotsOfAConfiguredNode(t *testing.T) {
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(config, []byte("tls-san: [kedge.example.org]\ndata-dir: "+dir+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"snapshot", "ls"}, {"server", "reset"}} {
		p := newProgram()
		p.ResetServer = func(Node) (string, error) { return "kept", nil }
		if code, out, errOut := p.run(append(args, "--config="+config)...); code != 0 {
			t.Errorf("%v: exit code %d, %s%s", args, code, out, errOut)
		}
	}
}
