package logging

import (
	"bytes"
	"errors"
	stdlog "log"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"k8s.io/klog/v2"
)

// All these loggers are global, so one test goes through them.
func TestEmbeddedLoggersEndHere(t *testing.T) {
	var out bytes.Buffer
	Setup(New(&out, Config{Level: slog.LevelInfo}))
	t.Cleanup(func() {
		klog.ClearLogger()
		stdlog.SetOutput(os.Stderr)
		logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
	})
	klog.InfoS("chatter")
	klog.ErrorS(errors.New("why"), "klog trouble", "key", "v")
	logrus.WithField("id", 7).WithError(errors.New("why")).Info("more chatter")
	logrus.WithField("id", 7).WithError(errors.New("why")).Warn("logrus trouble")
	slog.Info("ours", Component, "x")
	slog.Info("nobody's", "key", "v")
	slog.Default().WithGroup("g").Info("nobody's", Component, "in the group")
	stdlog.Print("http: TLS handshake error")
	klog.ErrorS(nil, "Skipping pod synchronization")
	noNode := errors.New(`error updating CSINode annotation: timed out waiting for the condition; caused by: nodes "x" not found`)
	klog.Errorf("Failed to initialize CSINode: %v", noNode)
	Settled()
	klog.ErrorS(nil, "Skipping pod synchronization")
	klog.Errorf("Failed to initialize CSINode: %v", noNode)
	klog.Flush()

	var got []string
	for line := range strings.Lines(out.String()) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), " ") // the time
		got = append(got, rest)
	}
	want := []string{
		`level=ERROR msg="klog trouble" component=kubernetes err=why key=v`,
		`level=WARN msg="logrus trouble" component=containerd`,
		`level=INFO msg=ours component=x`,
		`level=INFO msg=nobody's key=v component=kedge`,
		`level=INFO msg=nobody's component=kedge g.component="in the group"`,
		`level=INFO msg="http: TLS handshake error" component=library`,
		`level=ERROR msg="Skipping pod synchronization" component=kubernetes`,
		`level=ERROR msg="Failed to initialize CSINode: error updating`,
	}
	if len(got) != len(want) {
		t.Fatalf("%d lines, want %d:\n%s", len(got), len(want), out.String())
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("line %d is %s\nwant %s", i, got[i], want[i])
		}
	}
	if !strings.Contains(got[1], "id=7") || !strings.Contains(got[1], "error=why") {
		t.Errorf("fields are missing: %s", got[1])
	}
}

func TestParseLevel(t *testing.T) {
	for in, want := range map[string]slog.Level{"": slog.LevelInfo, "DEBUG": slog.LevelDebug, "warning": slog.LevelWarn, "trace": LevelTrace} {
		if got, err := ParseLevel(in); err != nil || got != want {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	if _, err := ParseLevel("loud"); err == nil {
		t.Error("a level that does not exist was accepted")
	}
}
