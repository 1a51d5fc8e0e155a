package logging

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func TestZapLevels(t *testing.T) {
	for _, tc := range []struct {
		name  string
		slog  slog.Level
		write func(*zap.Logger)
		want  string
	}{
		{"debug is below debug", slog.LevelDebug, func(z *zap.Logger) { z.Debug("m") }, ""},
		{"debug is one step below", levelTrace, func(z *zap.Logger) { z.Debug("m") }, "level=DEBUG-4 msg=m\n"},
		{"info is not info", slog.LevelInfo, func(z *zap.Logger) { z.Info("m") }, ""},
		{"info is debug", slog.LevelDebug, func(z *zap.Logger) { z.Info("m") }, "level=DEBUG msg=m\n"},
		{"warn is warn", slog.LevelInfo, func(z *zap.Logger) { z.Warn("m") }, "level=WARN msg=m\n"},
		{"error is error", slog.LevelInfo, func(z *zap.Logger) { z.Error("m") }, "level=ERROR msg=m\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var out bytes.Buffer
			tc.write(Zap(testLogger(&out, tc.slog)))
			if got := out.String(); got != tc.want {
				t.Errorf("wrote %q, want %q", got, tc.want)
			}
		})
	}
}

func TestZapFields(t *testing.T) {
	var out bytes.Buffer
	z := Zap(testLogger(&out, slog.LevelInfo)).Named("raft").With(zap.String("member", "a"))
	z.Warn("slow", zap.Int("ticks", 3), zap.Error(errors.New("late")), zap.Strings("peers", []string{"b", "c"}))

	want := "level=WARN msg=slow member=a logger=raft ticks=3 error=late peers=\"[b c]\"\n"
	if got := out.String(); got != want {
		t.Errorf("wrote %q, want %q", got, want)
	}
}

// A fatal message must reach the log even where only errors are kept, and must call the owner's hook.
func TestZapFatalHook(t *testing.T) {
	var out bytes.Buffer
	hook := make(chan string, 1)
	z := Zap(testLogger(&out, slog.LevelError)).WithOptions(zap.WithFatalHook(hookFunc(func(e *zapcore.CheckedEntry) {
		hook <- e.Message
	})))

	z.Fatal("disk gone")

	if got := <-hook; got != "disk gone" {
		t.Errorf("hook saw %q", got)
	}
	if !strings.Contains(out.String(), "level=ERROR msg=\"disk gone\"") {
		t.Errorf("log is %q", out.String())
	}
}

type hookFunc func(*zapcore.CheckedEntry)

func (f hookFunc) OnWrite(e *zapcore.CheckedEntry, _ []zapcore.Field) { f(e) }

func testLogger(out *bytes.Buffer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
}
