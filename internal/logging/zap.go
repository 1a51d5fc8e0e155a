package logging

import (
	"context"
	"log/slog"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// levelTrace is one step below slog's debug: for what an embedded library calls debug.
const levelTrace = slog.LevelDebug - 4

// Zap returns a zap logger that writes to l, for libraries that insist on zap.
//
// What such a library calls info is the story of its own internals, so it arrives as debug, and its debug
// one step lower still; warnings and errors keep their level. Fatal and panic arrive as errors and then do
// what zap does by default (end the process, panic): an owner that wants to fail in order replaces that with
// zap.WithFatalHook and zap.WithPanicHook.
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

// Enabled is asked before a message is formatted, so a library that logs much costs little when unheard.
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

// slogAttrs keeps the order of the fields. One encoder per field, because an encoder is a map and a later
// field of the same key would hide an earlier one.
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
