package logging

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/sirupsen/logrus"
)

// setupLogrus sends logrus' global logger, which is containerd's, to log.
func setupLogrus(log *slog.Logger) {
	l := logrus.StandardLogger()
	l.SetOutput(io.Discard)
	l.SetFormatter(discard{})
	l.ReplaceHooks(logrus.LevelHooks{})
	h := &quieter{next: log.Handler(), component: "containerd"}
	l.AddHook(&logrusHook{h: h})
	// logrus formats only lines of its level, so its level is that of our handler.
	switch {
	case h.Enabled(context.Background(), slog.LevelDebug):
		l.SetLevel(logrus.DebugLevel)
	case h.Enabled(context.Background(), slog.LevelInfo):
		l.SetLevel(logrus.InfoLevel)
	default:
		l.SetLevel(logrus.WarnLevel)
	}
}

// discard formats nothing: the hook has already passed the entry on.
type discard struct{}

func (discard) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

type logrusHook struct{ h slog.Handler }

func (*logrusHook) Levels() []logrus.Level { return logrus.AllLevels }

func (k *logrusHook) Fire(e *logrus.Entry) error {
	level := slog.LevelError
	switch e.Level {
	case logrus.TraceLevel, logrus.DebugLevel:
		level = slog.LevelDebug
	case logrus.InfoLevel:
		level = slog.LevelInfo
	case logrus.WarnLevel:
		level = slog.LevelWarn
	}
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	if !k.h.Enabled(ctx, level) {
		return nil
	}
	r := slog.NewRecord(e.Time, level, e.Message, 0)
	for key, v := range e.Data {
		switch v := v.(type) {
		case error:
			r.AddAttrs(slog.String(key, v.Error()))
		case string, int, int64, uint32, uint64, bool, time.Duration:
			r.AddAttrs(slog.Any(key, v))
		default:
			r.AddAttrs(slog.String(key, fmt.Sprint(v)))
		}
	}
	return k.h.Handle(ctx, r)
}
