package main

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/internal/test/image"
)

// output is what ginkgo writes, shortened.
const output = `Running Suite: Kubernetes e2e suite
------------------------------
[SynchronizedBeforeSuite] PASSED [0.028 seconds]
[SynchronizedBeforeSuite] 
------------------------------
SSSS• [18.255 seconds]
[sig-apps] CronJob should run [Conformance] [Slow] [sig-apps, Slow, Conformance]
k8s.io/kubernetes/test/e2e/apps/cronjob.go:127

  Timeline >>
  << Timeline
------------------------------
SSS
------------------------------
• [FAILED] [8.5 seconds]
[sig-node] Secrets [It] should be seen [Conformance] [sig-node, Conformance]
secrets.go:98

  [FAILED] in [It] - output.go:263
  [FAILED] expected "a" in container output: Expected
      <string>: b
------------------------------
S [SKIPPED] [0.1 seconds]
[sig-node] Swap should work [sig-node]
swap.go:9

  [SKIPPED] no swap here
------------------------------
• [INTERRUPTED] [1.0 seconds]
[sig-node] Pods should go [sig-node]
------------------------------
• [TIMEDOUT] [600.000 seconds]
[sig-node] Pods [BeforeEach] should stay [sig-node]
------------------------------
[sig-node] Pods should be alone [Serial] [sig-node, Serial]
pods.go:7
  STEP: being alone
• [300.250 seconds]
------------------------------
• [1.000 seconds]
[sig-node] is of nobody [sig-node]
------------------------------
Summarizing 1 Failure:
  [FAIL] [sig-node] Secrets [It] should be seen
`

func TestParse(t *testing.T) {
	// The name as ginkgo has it lacks "[It] " and "[BeforeEach] ", which its output puts
	// before the last part.
	known := map[string]bool{}
	for _, n := range []string{"[sig-apps] CronJob should run [Conformance] [Slow]", "[sig-node] Secrets should be seen [Conformance]",
		"[sig-node] Swap should work", "[sig-node] Pods should go", "[sig-node] Pods should stay", "[sig-node] Pods should be alone [Serial]"} {
		known[n] = true
	}
	var got []result
	var ofFailure string
	err := parse(strings.NewReader(output), known, func(r result, block []byte) error {
		if r.Status == failed && ofFailure == "" {
			ofFailure = string(block)
		}
		got = append(got, r)
		return nil
	})
	want := []result{
		{Name: "[sig-apps] CronJob should run [Conformance] [Slow]", Status: passed, Seconds: 18.255},
		{Name: "[sig-node] Secrets should be seen [Conformance]", Status: failed, Seconds: 8.5, Reason: `expected "a" in container output: Expected`},
		{Name: "[sig-node] Swap should work", Status: skipped, Seconds: 0.1, Reason: "no swap here"},
		{Name: "[sig-node] Pods should go", Status: broken, Seconds: 1},
		{Name: "[sig-node] Pods should stay", Status: failed, Seconds: 600},
		{Name: "[sig-node] Pods should be alone [Serial]", Status: passed, Seconds: 300.25},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v\n got %+v\nwant %+v", err, got, want)
	}
	if !strings.HasPrefix(ofFailure, "• [FAILED]") || !strings.HasSuffix(ofFailure, "<string>: b\n") {
		t.Errorf("output of the failure:\n%s", ofFailure)
	}
}

func TestWithin(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse(time.TimeOnly, s)
		if err != nil {
			t.Fatal(err)
		}
		return v.AddDate(2026, 0, 0)
	}
	log := "kedge\n"
	for _, s := range []string{"10:00:00", "10:00:05", "10:00:06", "10:00:20"} {
		log += "time=" + at(s).Format("2006-01-02T15:04:05.000Z") + " msg=" + s + "\nmore of " + s + "\n"
	}
	got := string(within([]byte(log), at("10:00:05"), at("10:00:19")))
	for s, want := range map[string]bool{"10:00:00": false, "10:00:05": true, "10:00:06": true, "10:00:20": false} {
		if strings.Contains(got, "msg="+s) != want || strings.Contains(got, "more of "+s) != want {
			t.Errorf("lines of %s: want %v, got\n%s", s, want, got)
		}
	}
}

func TestPick(t *testing.T) {
	names := []string{"a [x]", "b", "c"}
	got, err := pick(names, "# some\n\nc\na [x]\n")
	if err != nil || !slices.Equal(got, []string{"c", "a [x]"}) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := pick(names, "d\n"); err == nil {
		t.Error("a spec that is not there was picked")
	}
}

func TestFocusesStayShort(t *testing.T) {
	var names []string
	for range 3000 {
		names = append(names, "[sig-node] "+strings.Repeat("x", 100))
	}
	args := focuses(names)
	n := 0
	for _, a := range args {
		if len(a) >= 128<<10 {
			t.Errorf("an argument of %d bytes", len(a))
		}
		n += strings.Count(a, "sig-node")
	}
	if n != len(names) || len(args) < 4 {
		t.Errorf("%d names in %d arguments", n, len(args))
	}
}

// options of a run without a suite.
func someOptions(t *testing.T) options {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"kedge", "e2e.test", "stamp"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return options{build: dir, kedge: filepath.Join(dir, "kedge"), runs: filepath.Join(dir, "runs"), servers: 1, resume: true}
}

// TestResume: a run that was killed in the middle of a line goes on with what has not
// passed, and only with the same executables and options.
func TestResume(t *testing.T) {
	o := someOptions(t)
	open := func() *record {
		t.Helper()
		r, err := openRecord(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.close() })
		return r
	}
	chosen := []string{"[sig-a] one", "[sig-a] two", "[sig-b] three", "[sig-b] four", "[sig-b] five"}
	first := open()
	for i, s := range []string{passed, failed, skipped, broken} {
		if err := first.add(result{Name: chosen[i], Status: s, Seconds: float64(i), End: time.Now(), Reason: "why"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := first.file.WriteString(`{"name":"[sig-b] fi`); err != nil {
		t.Fatal(err)
	}
	second := open()
	if got := second.remaining(chosen); !slices.Equal(got, []string{"[sig-a] two", "[sig-b] four", "[sig-b] five"}) {
		t.Errorf("to run: %q", got)
	}
	if err := second.add(result{Name: chosen[1], Status: passed, End: time.Now()}); err != nil {
		t.Fatal(err)
	}
	third := open()
	text, err := third.report(chosen)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"5 specs: passed 2, failed 0, skipped by themselves 1, not run 2\n", "PASSED after 1 failures: [sig-a] two", "[sig-a]", "passed 2, failed 0\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("the summary lacks %q:\n%s", want, text)
		}
	}
	if data, err := os.ReadFile(filepath.Join(third.dir, "junit.xml")); err != nil || !strings.Contains(string(data), `tests="3" failures="0" skipped="1"`) {
		t.Errorf("%v, %s", err, data)
	}
	if err := os.WriteFile(o.kedge, []byte("another"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := open().remaining(chosen); len(got) != len(chosen) {
		t.Errorf("another kedge has specs behind it: to run are %q", got)
	}
	if err := os.WriteFile(o.kedge, []byte("kedge"), 0o644); err != nil {
		t.Fatal(err)
	}
	o.resume = false
	if got := open().remaining(chosen); len(got) != len(chosen) {
		t.Errorf("not resumed, to run are %q", got)
	}
}

func TestReadDryRun(t *testing.T) {
	type spec struct {
		LeafNodeType, LeafNodeText, State string
		ContainerHierarchyTexts           []string
	}
	data, err := json.Marshal([]map[string][]spec{{"SpecReports": {
		{"BeforeSuite", "", "passed", nil},
		{"It", "should run", "passed", []string{"[sig-apps] Job", "when told"}},
		{"It", "should not", "skipped", []string{"[sig-apps] Job"}},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readDryRun(data); err != nil || !slices.Equal(got, []string{"[sig-apps] Job when told should run"}) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := readDryRun([]byte(`[{}]`)); err == nil {
		t.Error("a suite without specs is no error")
	}
}

// TestRegistry pulls an image as a node does: its manifest by tag, then by digest, then
// what that names.
func TestRegistry(t *testing.T) {
	archive := filepath.Join(t.TempDir(), "images.tar")
	image.Write(t, archive, image.Docker,
		image.Image{Name: "registry.k8s.io/team/tool:1", Files: map[string]image.File{"/a": {Data: []byte("first")}}},
		image.Image{Name: "registry.k8s.io/other:2", Files: map[string]image.File{"/b": {Data: []byte("second")}}})
	r, err := openRegistry(archive)
	if err != nil {
		t.Fatal(err)
	}
	address, err := r.serve("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.close() })
	get := func(path string) (int, string, []byte) {
		t.Helper()
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, resp.Header.Get("Docker-Content-Digest"), data
	}
	_, digest, byTag := get("/v2/team/tool/manifests/1")
	if code, _, data := get("/v2/team/tool/manifests/" + digest); code != http.StatusOK || string(data) != string(byTag) || digest != sum(data) {
		t.Errorf("by digest %s: %d %s, by tag %s", digest, code, data, byTag)
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	if err := json.Unmarshal(byTag, &manifest); err != nil || len(manifest.Layers) != 1 {
		t.Fatalf("%v, %s", err, byTag)
	}
	for _, d := range append(manifest.Layers, manifest.Config) {
		if code, _, data := get("/v2/team/tool/blobs/" + d.Digest); code != http.StatusOK || int64(len(data)) != d.Size || sum(data) != d.Digest {
			t.Errorf("%+v: %d, %d bytes of digest %s", d, code, len(data), sum(data))
		}
	}
	for _, path := range []string{"/v2/team/tool/manifests/2", "/v2/nobody/manifests/1", "/v2/team/tool/blobs/sha256:0"} {
		if code, _, _ := get(path); code != http.StatusNotFound {
			t.Errorf("%s: %d", path, code)
		}
	}
}
