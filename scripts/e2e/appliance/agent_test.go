package appliance

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestInstallAgent: the token of an agent is in a file that is only root's, and gone when the agent has joined. The machine of
// the agent has no service manager.
func TestInstallAgent(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	token := f.NewToken(t)
	a := f.NewAgent(t)
	install := append([]string{"install", "agent", "--bin-dir=/root/bin", "--token=" + token}, a.Args()...)
	out, err := a.RunKedge(install...)
	if err != nil || !strings.Contains(out, "/root/bin/kedge agent\n") || !strings.Contains(out, "Run \"kedge install agent\" again when the node has joined") {
		t.Fatalf("%v\n%s", err, out)
	}
	read := func(path string) string {
		t.Helper()
		data, err := os.ReadFile(a.Machine.Disk(path))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if got := read("/etc/kedge/token"); got != token+"\n" {
		t.Errorf("the token is %q", got)
	}
	if st, err := os.Stat(a.Machine.Disk("/etc/kedge/token")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the token's file: %v, %v", st, err)
	}
	for _, path := range []string{"/etc/kedge/config.yaml", "/var/lib/kedge/install.json"} {
		if strings.Contains(read(path), token) {
			t.Errorf("%s has the token in it", path)
		}
	}
	a.Flags = nil // the server's URL and the token are configured
	if err := a.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error { return f.NodeIsReady(a.Name) })
	if out, err := a.RunKedge("install", "agent", "--bin-dir=/root/bin"); err != nil {
		t.Fatalf("again: %v\n%s", err, out)
	}
	if _, err := os.Stat(a.Machine.Disk("/etc/kedge/token")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the token is still there: %v", err)
	}
	if config := read("/etc/kedge/config.yaml"); strings.Contains(config, "token") || !strings.Contains(config, "server: "+f.URL()) {
		t.Errorf("the configuration is\n%s", config)
	}
}
