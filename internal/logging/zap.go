package logging

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// levelTrace is one step below slog's debug, for debug lines of an embedded library.
const levelTrace = slog.LevelDebug - 4

// Zap returns a zap logger that writes to l, for libraries that insist on zap.
//
// The info lines of such a library are about its internals, so they become debug, and its debug lines trace;
// warnings and errors keep their level. Fatal and panic are logged as errors and then do what zap does by default
// (end the process, panic). Owners that need an orderly stop replace that with zap.WithFatalHook and
// zap.WithPanicHook.
func Zap(l *slog.Logger) *zap.Logger {
	return zap.New(&zapCore{handler: l.Handler()})
}

// zapCore is a zapcore.Core in front of a slog.Handler.
type zapCore struct {
	handler slog.Handler
}

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l < zapcore.InfoLevel:
		return levelTrace
	case l == zapcore.InfoLevel:
		return slog.LevelDebug
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	default:
		return slog.LevelError
	}
}

// Enabled is called before a message is formatted, so that lines below the level cost little.
func (c *zapCore) Enabled(l zapcore.Level) bool {
	return c.handler.Enabled(context.Background(), slogLevel(l))
}

func (c *zapCore) With(fields []zapcore.Field) zapcore.Core {
	if len(fields) == 0 {
		return c
	}
	return &zapCore{handler: c.handler.WithAttrs(slogAttrs(fields))}
}

func (c *zapCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(entry.Level) {
		return checked.AddCore(entry, c)
	}
	return checked
}

func (c *zapCore) Write(entry zapcore.Entry, fields []zapcore.Field) error {
	record := slog.NewRecord(entry.Time, slogLevel(entry.Level), entry.Message, entry.Caller.PC)
	if entry.LoggerName != "" {
		record.AddAttrs(slog.String("logger", entry.LoggerName))
	}
	record.AddAttrs(slogAttrs(fields)...)
	return c.handler.Handle(context.Background(), record)
}

func (c *zapCore) Sync() error { return nil }

// slogAttrs keeps the order of the fields. It uses an encoder for each field, because an encoder is a map and a
// later field of the same key would hide an earlier field.
func slogAttrs(fields []zapcore.Field) []slog.Attr {
	attrs := make([]slog.Attr, 0, len(fields))
	for _, field := range fields {
		encoder := zapcore.NewMapObjectEncoder()
		field.AddTo(encoder)
		if value, ok := encoder.Fields[field.Key]; ok {
			attrs = append(attrs, slog.Any(field.Key, value))
			continue
		}
		// An inlined object writes under keys of its own.
		for key, value := range encoder.Fields {
			attrs = append(attrs, slog.Any(key, value))
		}
	}
	return attrs
}
