package logging

import (
	"context"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	goruntime "runtime"
	"strings"

	"k8s.io/klog/v2"
)

// Component is the key under which every line names the part it comes from.
const Component = "component"

// Config says what the log looks like.
type Config struct {
	Level  slog.Level
	Format Format
}

// Format is how a line is written.
type Format string

// The formats of a line.
const (
	Text Format = "text" // key=value
	JSON Format = "json" // one object a line
)

// ParseLevel reads trace, debug, info, warn (or warning) and error.
func ParseLevel(s string) (slog.Level, error) {
	switch strings.ToLower(s) {
	case "trace":
		return LevelTrace, nil
	case "debug":
		return slog.LevelDebug, nil
	case "info", "":
		return slog.LevelInfo, nil
	case "warn", "warning":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, fmt.Errorf("log level %q is none of trace, debug, info, warn, error", s)
}

// LevelTrace is below debug: the verbose lines of the embedded components.
const LevelTrace = slog.LevelDebug - 4

// New makes a logger that writes to w. It changes nothing global.
func New(w io.Writer, cfg Config) *slog.Logger {
	options := &slog.HandlerOptions{Level: cfg.Level}
	if cfg.Format == JSON {
		return slog.New(named{next: slog.NewJSONHandler(w, options)})
	}
	return slog.New(named{next: slog.NewTextHandler(w, options)})
}

// Setup sends the global loggers of the embedded components to log: slog's own
// default, that of the standard library, klog and logrus. It must run before any of them is used and only
// once in a process.
func Setup(log *slog.Logger) {
	slog.SetDefault(log)
	// What a server of net/http has to say of its clients comes this way, for one.
	library := log.With(Component, "library").Handler()
	stdlog.SetOutput(slog.NewLogLogger(library, slog.LevelInfo).Writer())
	setupKlog(log)
	setupLogrus(log)
}

// OnFatal keeps klog's fatal messages from ending the process at once, with its
// datastore open: f is called and must begin an orderly stop, and the goroutine that
// logged the message ends. The API server does so when a part of its start is cut
// short by a stop, too.
func OnFatal(f func()) {
	klog.OsExit = func(int) {
		f()
		goruntime.Goexit()
	}
}

// setupKlog gives klog our handler. How klog exits is not changed: see [OnFatal].
func setupKlog(log *slog.Logger) {
	h := &quieter{next: log.Handler(), component: "kubernetes", verbose: true}
	klog.SetSlogLogger(slog.New(h))
}

// quieter lowers what an embedded component calls info to debug, and its
// verbose lines to trace, so that an idle node is silent at our info level.
// It also names the component on lines that do not do so themselves.
type quieter struct {
	next      slog.Handler
	component string
	named     bool // an attribute already names the component
	verbose   bool // heeds [Verbose]
}

func lower(l slog.Level) slog.Level {
	switch {
	case l >= slog.LevelWarn:
		return l
	case l >= slog.LevelInfo:
		return slog.LevelDebug
	}
	return LevelTrace
}

func (q *quieter) Enabled(ctx context.Context, l slog.Level) bool {
	return q.next.Enabled(ctx, lower(l)) || q.verbose && verbose.Load().may(l)
}

func (q *quieter) Handle(ctx context.Context, r slog.Record) error {
	message, level := strings.TrimSpace(r.Message), lower(r.Level)
	if r.Level >= slog.LevelWarn && isBenign(r, message) {
		if level = slog.LevelDebug; !q.next.Enabled(ctx, level) {
			return nil
		}
	} else if q.verbose && !q.next.Enabled(ctx, level) && !verbose.Load().shows(r) {
		return nil // another file's lines of this level are shown
	}
	out := slog.NewRecord(r.Time, level, message, r.PC)
	if !q.named {
		out.AddAttrs(slog.String(Component, q.component))
	}
	r.Attrs(func(a slog.Attr) bool {
		out.AddAttrs(a)
		return true
	})
	return q.next.Handle(ctx, out)
}

func (q *quieter) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *q
	for _, a := range attrs {
		c.named = c.named || a.Key == Component
	}
	c.next = q.next.WithAttrs(attrs)
	return &c
}

func (q *quieter) WithGroup(name string) slog.Handler {
	c := *q
	c.next = q.next.WithGroup(name)
	return &c
}

// Embedded returns the logger for an embedded component that takes an
// [slog.Handler] of its own: its lines are lowered as klog's are.
func Embedded(log *slog.Logger, component string) *slog.Logger {
	return slog.New(&quieter{next: log.Handler(), component: component})
}
