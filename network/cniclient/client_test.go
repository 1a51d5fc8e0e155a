package cniclient

import (
	"bytes"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// allowed are the packages that the client may import: each is one more to
// initialize, for every pod.
var allowed = []string{"encoding/json", "errors", "fmt", "io", "net", "os", "time"}

func TestImportsStayFew(t *testing.T) {
	out, err := exec.Command("go", "list", "-f", `{{join .Imports "\n"}}`, ".").Output()
	if err != nil {
		t.Skipf("needs the go command: %v", err)
	}
	for imp := range strings.FieldsSeq(string(out)) {
		if !slices.Contains(allowed, imp) {
			t.Errorf("imports %s: the plugin is started for every pod and must stay small; move the work to network/cni", imp)
		}
	}
}

// server answers one request after the other with what answer returns.
func server(t *testing.T, answer func(Request) Response) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cni")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			var req Request
			if err := json.NewDecoder(conn).Decode(&req); err == nil {
				json.NewEncoder(conn).Encode(answer(req))
			}
			conn.Close()
		}
	}()
	return path
}

func plugin(env map[string]string, stdin string) (int, string) {
	var out bytes.Buffer
	code := run(func(k string) string { return env[k] }, strings.NewReader(stdin), &out)
	return code, strings.TrimSpace(out.String())
}

func TestRequestAndAnswerPassThrough(t *testing.T) {
	var got Request
	socket := server(t, func(r Request) Response {
		got = r
		return Response{Output: json.RawMessage(`{"ips":[]}`)}
	})
	conf := `{"cniVersion":"1.0.0","socket":"` + socket + `"}`
	code, out := plugin(map[string]string{
		"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/x",
		"CNI_IFNAME": "eth0", "CNI_ARGS": "A=1", "CNI_PATH": "/bin",
	}, conf)
	if code != 0 || out != `{"ips":[]}` {
		t.Errorf("exit code %d, output %s", code, out)
	}
	want := Request{"ADD", "c1", "/run/netns/x", "eth0", "A=1", "/bin", json.RawMessage(conf)}
	if a, b := mustJSON(t, got), mustJSON(t, want); a != b {
		t.Errorf("server got %s, want %s", a, b)
	}
}

func TestErrors(t *testing.T) {
	refuses := server(t, func(Request) Response {
		return Response{Failed: true, Output: json.RawMessage(`{"code":3}`)}
	})
	for _, c := range []struct {
		name, command, conf, want string
	}{
		{"answered", "DEL", `{"socket":"` + refuses + `"}`, `{"code":3}`},
		{"nobody listens", "DEL", `{"cniVersion":"0.4.0","socket":"/nonexistent/sock"}`, `"cniVersion":"0.4.0","code":11`},
		{"no socket", "ADD", `{"cniVersion":"1.0.0"}`, `"code":7`},
		{"no configuration", "ADD", ``, `"code":7`},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, out := plugin(map[string]string{"CNI_COMMAND": c.command}, c.conf)
			if code != 1 || !strings.Contains(out, c.want) {
				t.Errorf("exit code %d, output %s, want 1 and %s", code, out, c.want)
			}
			if !json.Valid([]byte(out)) {
				t.Errorf("output is not JSON: %s", out)
			}
		})
	}
}

func TestVersionNeedsNobody(t *testing.T) {
	code, out := plugin(map[string]string{"CNI_COMMAND": "VERSION"}, `{"cniVersion":"1.1.0"}`)
	if code != 0 || !strings.Contains(out, `"supportedVersions":["0.3.0",`) || !strings.Contains(out, `"cniVersion":"1.1.0"`) {
		t.Errorf("exit code %d, output %s", code, out)
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
