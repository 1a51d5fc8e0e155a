package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"aead.dev/minisign"

	"kedge/appliance/release"
)

// sample returns a release whose programs are a small one of kedge's scripts, with a secret key that is trusted.
func sample(t *testing.T) (*build, []release.Key) {
	t.Helper()
	_, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	public := secret.Public().(release.Key)
	b := &build{
		version: "v1.2.3", commit: "abc", date: time.Unix(1e9, 0), root: t.TempDir(), out: t.TempDir(), arches: []string{runtime.GOARCH}, host: runtime.GOARCH,
		others: []module{{path: "libseccomp", version: "2.5.4"}}, secret: &secret,
	}
	program := filepath.Join(t.TempDir(), "program")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", program, "./scripts/pack")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOAMD64=v1", "GOARM64=v8.0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, to := range b.programs(runtime.GOARCH) {
		link(t, program, to)
	}
	link(t, "../../LICENSE", filepath.Join(b.root, "LICENSE"))
	script, err := os.ReadFile("../install.sh")
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(b.root, "scripts/install.sh"), withKey(script, public.String()))
	return b, []release.Key{public}
}

func link(t *testing.T, from, to string) {
	t.Helper()
	content, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	write(t, to, content)
}

func write(t *testing.T, file string, content []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, content, 0o755); err != nil {
		t.Fatal(err)
	}
}

// contents returns the files below a folder.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		rel, _ := filepath.Rel(dir, path)
		out[rel] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// The release is complete, can be verified, and is the same the second time.
func TestMake(t *testing.T) {
	b, trusted := sample(t)
	if err := b.make(trusted); err != nil {
		t.Fatal(err)
	}
	first := contents(t, b.out)
	for _, name := range []string{"install.sh", "channels/stable", "channels/latest", "v1.2.3/install.sh", "v1.2.3/VERSION", "v1.2.3/LICENCES.md", "v1.2.3/sbom.cdx.json", "v1.2.3/SHA256SUMS", "v1.2.3/SHA256SUMS.minisig", "v1.2.3/" + release.Executable(runtime.GOARCH)} {
		if first[name] == "" {
			t.Errorf("%s is missing or empty", name)
		}
	}
	found, err := release.VerifyFolder(filepath.Join(b.out, "v1.2.3"), trusted)
	if err != nil || len(found.Absent) > 0 || len(found.Checked) != 5 || found.Version != "v1.2.3" {
		t.Errorf("%+v, %v", found, err)
	}
	if !strings.Contains(first["v1.2.3/LICENCES.md"], "| libseccomp | 2.5.4 | LGPL-2.1-only | ") || !strings.Contains(first["v1.2.3/LICENCES.md"], "GNU LESSER GENERAL PUBLIC LICENSE") {
		t.Error("the licence of libseccomp is missing")
	}

	b.out = t.TempDir()
	if err := b.make(trusted); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(first, contents(t, b.out)) {
		t.Error("the second time the release differs")
	}
}

func TestModulesAreListed(t *testing.T) {
	b, trusted := sample(t)
	if err := b.make(trusted); err != nil {
		t.Fatal(err)
	}
	var bom struct {
		Metadata   struct{ Timestamp string }
		Components []struct {
			Name, Version, Purl string
			Hashes              []struct{ Alg, Content string }
			Licenses            []struct{ License struct{ ID string } }
		}
	}
	if err := json.Unmarshal([]byte(contents(t, b.out)["v1.2.3/sbom.cdx.json"]), &bom); err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(b.launcher(runtime.GOARCH))
	if err != nil {
		t.Fatal(err)
	}
	if len(bom.Components) != len(info.Deps)+2 { // with the standard library and libseccomp
		t.Errorf("%d components, and %d modules", len(bom.Components), len(info.Deps))
	}
	seen := map[string]bool{}
	for _, c := range bom.Components {
		seen[c.Purl] = true
		if c.Version == "" || len(c.Licenses) != 1 || c.Licenses[0].License.ID == "" {
			t.Errorf("%+v", c)
		}
		if c.Name == "github.com/klauspost/compress" && (len(c.Hashes) != 1 || len(c.Hashes[0].Content) != 64) {
			t.Errorf("%+v", c)
		}
	}
	if !seen["pkg:golang/std@"+strings.TrimPrefix(runtime.Version(), "go")] || !seen["pkg:generic/libseccomp@2.5.4"] {
		t.Errorf("%v", seen)
	}
	if bom.Metadata.Timestamp != "2001-09-09T01:46:40Z" {
		t.Errorf("timestamp %s", bom.Metadata.Timestamp)
	}
}

func TestUnsigned(t *testing.T) {
	b, _ := sample(t)
	b.secret, b.version = nil, "v1.2.3-rc.1"
	if err := b.make(nil); err != nil {
		t.Fatal(err)
	}
	got := contents(t, b.out)
	if _, signed := got["v1.2.3-rc.1/SHA256SUMS.minisig"]; signed || keyOf([]byte(got["install.sh"])) != "" || got["channels/latest"] != "v1.2.3-rc.1\n" {
		t.Error("it is not as it should be")
	}
	if _, stable := got["channels/stable"]; stable {
		t.Error("a candidate is stable")
	}
	if !strings.Contains(got["install.sh"], "\nkey=''\n") {
		t.Error("the script has no line for the key")
	}
}

// A release that its own executable and script would refuse is not made.
func TestForeignKeyDoesNotSign(t *testing.T) {
	b, trusted := sample(t)
	other, _ := sample(t)
	if err := other.make(trusted); err == nil || !strings.Contains(err.Error(), "the executable would not trust") {
		t.Errorf("%v", err)
	}
	// That is known before anything is built.
	file := filepath.Join(t.TempDir(), "key")
	text, err := other.secret.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	write(t, file, text)
	if err := b.mayUse(file, trusted); err == nil || !strings.Contains(err.Error(), "the executable would not trust") {
		t.Errorf("%v", err)
	}
	if text, err = b.secret.MarshalText(); err != nil {
		t.Fatal(err)
	}
	write(t, file, text)
	if err := b.mayUse(file, trusted); err != nil {
		t.Error(err)
	}

	write(t, filepath.Join(b.root, "scripts/install.sh"), []byte("key=''\n"))
	if err := b.make(trusted); err == nil || !strings.Contains(err.Error(), "install.sh would not trust") {
		t.Errorf("%v", err)
	}
	if got := contents(t, b.out); len(got) > 0 {
		t.Errorf("%d files were written", len(got))
	}
}

// The script and the executable have the same key.
func TestScriptHasTheKey(t *testing.T) {
	script, err := os.ReadFile("../install.sh")
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	if keys := release.BuiltIn(); len(keys) > 0 {
		want = keys[0].String()
	}
	if got := keyOf(script); got != want || !bytes.Contains(script, []byte("\nkey='"+want+"'\n")) {
		t.Errorf("scripts/install.sh has the key %q, and appliance/release/keys.go %q", got, want)
	}
}

func TestSecretKeys(t *testing.T) {
	_, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := secret.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	write(t, file, append(text, '\n'))
	if got, err := readSecret(file); err != nil || !got.Equal(secret) {
		t.Errorf("%v", err)
	}
	write(t, file, []byte("key"))
	if _, err := readSecret(file); err == nil || !strings.Contains(err.Error(), "is not the secret key of minisign") {
		t.Errorf("%v", err)
	}
}

func TestVersionsThatMayBeSigned(t *testing.T) {
	for version, want := range map[string]bool{
		"v1.2.3": true, "v1.2.3-rc.1": true, "v1.2.3+2": true,
		"v1.2.3-4-gabcdef012345": false, "v1.2.3-rc.1-4-gabcdef012345": false, "v1.2.3-dirty": false, "abcdef012345": false, "v1": false, "": false, "v1.2.3/..": false,
	} {
		if err := mayBeSigned(version); (err == nil) != want {
			t.Errorf("%s: %v", version, err)
		}
	}
	for _, args := range [][]string{{"-date", "2026-01-01T00:00:00Z"}, {"-date", "2026-01-01T00:00:00Z", "-unsigned", "-sign-key", "x"}} {
		if err := run(args); err == nil || !strings.Contains(err.Error(), "KEDGE_UNSIGNED=1") {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestReproducible(t *testing.T) {
	good := map[string]string{"-trimpath": "true", "GOARCH": "amd64", "GOAMD64": "v1", "CGO_ENABLED": "1", "CGO_CFLAGS": "-O2 -g"}
	for key, value := range map[string]string{"": "", "-trimpath": "", "GOAMD64": "v3", "GOARCH": "arm64", "vcs.revision": "abc", "CGO_CFLAGS": "-I/home/me"} {
		info := &debug.BuildInfo{}
		settings := maps.Clone(good)
		if key != "" {
			settings[key] = value
		}
		for k, v := range settings {
			if v != "" {
				info.Settings = append(info.Settings, debug.BuildSetting{Key: k, Value: v})
			}
		}
		if err := reproducible(info, "amd64"); (err == nil) != (key == "") {
			t.Errorf("%s=%s: %v", key, value, err)
		}
	}
}
