package logging

import (
	"bytes"
	"log/slog"
	"regexp"
	"slices"
	"testing"

	"github.com/sirupsen/logrus"
	"k8s.io/klog/v2"
)

// Verbose lines come by two ways: klog's own functions and the loggers of contexts. Both
// are to end in the log, whatever its level, and no others.
func TestVerbose(t *testing.T) {
	var out bytes.Buffer
	Setup(New(&out, Config{Level: slog.LevelWarn}))
	t.Cleanup(func() {
		verbose.Store(&verbosity{files: map[string]int{}})
		if err := Verbose(0, nil); err != nil { // klog hears of it
			t.Error(err)
		}
		klog.ClearLogger()
		logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
	})
	shown := func() []string {
		out.Reset()
		with := klog.LoggerWithValues(klog.Background(), "a", "b")
		klog.InfoS("s0")
		klog.V(2).InfoS("s2")
		klog.V(4).Infof("f%d", 4)
		klog.V(5).InfoS("s5")
		with.Info("c0")
		with.V(2).Info("c2")
		with.V(5).Info("c5")
		logrus.Info("containerd's")
		klog.Flush()
		var got []string
		for _, m := range regexp.MustCompile(`msg=(\S+)`).FindAllStringSubmatch(out.String(), -1) {
			got = append(got, m[1])
		}
		return got
	}
	for _, step := range []struct {
		v     int
		files map[string]int
		want  []string
	}{
		{0, nil, nil},
		{0, map[string]int{"verbosity": 9, "no-such": 9}, nil}, // this is another file
		{0, map[string]int{"verbos*_test": 2}, []string{"s0", "s2", "c0", "c2"}},
		{4, nil, []string{"s0", "s2", "f4", "c0", "c2"}},
		{1, nil, []string{"s0", "s2", "f4", "c0", "c2"}}, // the highest wins
		{0, map[string]int{"verbosity_test": 5}, []string{"s0", "s2", "f4", "s5", "c0", "c2", "c5"}},
	} {
		if err := Verbose(step.v, step.files); err != nil {
			t.Fatal(err)
		}
		if got := shown(); !slices.Equal(got, step.want) {
			t.Errorf("with v=%d and vmodule=%v these are shown: %q, want %q", step.v, step.files, got, step.want)
		}
	}
	if err := Verbose(0, map[string]int{"a[": 1}); err == nil {
		t.Error("a wrong pattern was accepted")
	}
}
