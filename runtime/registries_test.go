package runtime

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden files; look at the difference before committing it")

// TestHostFiles compares what containerd is told with files kept beside the input.
func TestHostFiles(t *testing.T) {
	inputs, err := filepath.Glob("testdata/registries/*.yaml")
	if err != nil || len(inputs) == 0 {
		t.Fatal("no inputs", err)
	}
	for _, input := range inputs {
		for _, noDefault := range []bool{false, true} {
			name := strings.TrimSuffix(filepath.Base(input), ".yaml")
			if noDefault {
				name += "-no-default"
			}
			t.Run(name, func(t *testing.T) {
				r, err := LoadRegistries(input)
				if err != nil {
					t.Fatal(err)
				}
				files := hostFiles(r, noDefault, func(mirror, endpoint string) string {
					return "http://127.0.0.1:1234/secret/" + mirror
				})
				var got strings.Builder
				for _, folder := range sortedKeys(files) {
					fmt.Fprintf(&got, "==> %s/hosts.toml\n%s\n", folder, files[folder])
				}
				auths := r.auths()
				for _, host := range sortedKeys(auths) {
					fmt.Fprintf(&got, "==> credentials %s: %v\n", host, auths[host])
				}
				golden := filepath.Join("testdata/registries", name+".golden")
				if *update {
					if err := os.WriteFile(golden, []byte(got.String()), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				want, err := os.ReadFile(golden)
				if err != nil {
					t.Fatal(err)
				}
				if got.String() != string(want) {
					t.Errorf("differs from %s:\n%s", golden, &got)
				}
			})
		}
	}
}

func TestParseRegistriesErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"misspelt key", "mirrors:\n  a.example:\n    endpoints: [b]\n", `unknown field "endpoints"`},
		{"bad rewrite", "mirrors:\n  a.example:\n    rewrite: {'(': x}\n", "mirror a.example: rewrite: error parsing regexp"},
		{"not an address", "mirrors:\n  a.example:\n    endpoint: ['ftp://b']\n", `endpoint "ftp://b" is not a URL`},
		{"half a pair", "configs:\n  a.example:\n    tls: {cert_file: /a}\n", "config a.example: cert_file and key_file"},
		{"not YAML", "mirrors: [", "yaml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseRegistries([]byte(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
		})
	}
	if r, err := LoadRegistries(filepath.Join(t.TempDir(), "none.yaml")); err != nil || len(r.Mirrors) > 0 {
		t.Errorf("no file: %v, %v", r, err)
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	r, err := LoadRegistries("testdata/registries/mirrors.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "registries", r, "auth", *r.Configs["mirror.example.com:5000"].Auth)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "registries", r)
	fmt.Fprintf(&log, "%v %+v %#v", r, *r.Configs["mirror.example.com:5000"].Auth, *r.Configs["mirror.example.com:5000"].Auth)
	if strings.Contains(log.String(), "hidden") {
		t.Errorf("a password is printed: %s", &log)
	}
}

func FuzzParseRegistries(f *testing.F) {
	inputs, _ := filepath.Glob("testdata/registries/*.yaml")
	for _, name := range inputs {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseRegistries(data)
		if err == nil {
			hostFiles(r, false, func(string, string) string { return "" })
			r.auths()
		}
	})
}
