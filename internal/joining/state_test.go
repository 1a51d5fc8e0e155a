package joining

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/internal/errorkind"
)

// stored are states as earlier versions of kedge have written them.
var stored = map[Role]string{
	Agent: `{
  "server": "https://192.0.2.1:6443",
  "address": "192.0.2.9",
  "cluster": {
    "servers": [
      "https://192.0.2.1:6443"
    ],
    "clusterCIDRs": [
      "10.42.0.0/16"
    ],
    "serviceCIDRs": [
      "10.43.0.0/16"
    ],
    "clusterDNS": [
      "10.43.0.10"
    ],
    "clusterDomain": "cluster.local",
    "backend": "vxlan"
  }
}
`,
	Server: `{
  "cluster": {
    "servers": [
      "https://192.0.2.1:6443"
    ],
    "clusterCIDRs": [
      "10.42.0.0/16"
    ],
    "serviceCIDRs": [
      "10.43.0.0/16"
    ],
    "clusterDNS": [
      "10.43.0.10"
    ],
    "clusterDomain": "cluster.local",
    "backend": "vxlan"
  },
  "admission": {
    "cluster": "1a",
    "name": "s2",
    "id": "2b",
    "url": "http://127.0.0.2:2380",
    "members": []
  }
}
`,
}

// TestStatesOfEarlierVersions: a state is read, and written as it was.
func TestStatesOfEarlierVersions(t *testing.T) {
	for role, text := range stored {
		dir := t.TempDir()
		path := StateFile(role, dir)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s, joined, err := ReadState(role, dir)
		if err != nil || !joined || s.Cluster.ClusterDomain != "cluster.local" {
			t.Fatalf("%s: %+v, %v, %v", role, s, joined, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if err := s.Write(role, dir); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("%s: %v: written as\n%s\nand was\n%s", role, err, got, text)
		}
		if st, err := os.Stat(path); err != nil || (st.Mode().Perm() == 0o600) != (role == Server) {
			t.Errorf("%s: mode %v, %v: a server's state can have secrets in it", role, st.Mode(), err)
		}
	}
}

// TestDamagedStates: a damaged state is an error that names the file, and never a machine that has not joined.
func TestDamagedStates(t *testing.T) {
	for role, text := range stored {
		for what, content := range map[string]string{
			"empty": "", "cut off": text[:len(text)/2], "no settings": "{}", "no domain": strings.Replace(text, "cluster.local", "", 1),
		} {
			dir := t.TempDir()
			path := StateFile(role, dir)
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, joined, err := ReadState(role, dir); joined || err == nil || !strings.Contains(err.Error(), path) || errorkind.ExitCode(err) != errorkind.ExitConfig {
				t.Errorf("%s, %s: %v, %v", role, what, joined, err)
			}
		}
		if _, joined, err := ReadState(role, filepath.Join(t.TempDir(), "none")); joined || err != nil {
			t.Errorf("%s, no file: %v, %v", role, joined, err)
		}
	}
}

// TestNoToken: a machine that has not joined is told how to make a token for its role.
func TestNoToken(t *testing.T) {
	for role, want := range map[Role]string{Agent: `"kedge token create" on`, Server: `"kedge token create --role server" on`} {
		err := Client{Role: role, Server: "https://192.0.2.1:6443", KeyFile: filepath.Join(t.TempDir(), "k")}.Join(t.Context(), nil, nil)
		if !errors.Is(err, ErrNotJoined) || !strings.Contains(err.Error(), want) || errorkind.ExitCode(err) != errorkind.ExitConfig {
			t.Errorf("%s: %v, want %s", role, err, want)
		}
	}
}
