package logging

import (
	"context"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"

	"k8s.io/klog/v2"
)

// Component is the key of the name of the component that a line comes from.
const Component = "component"

// Config is the configuration of the log.
type Config struct {
	Level  slog.Level
	Format Format
}

// Format is the format of a line.
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
	return 0, fmt.Errorf("invalid log level %q; use trace, debug, info, warn or error", s)
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
	// For one, servers of net/http log the errors of their clients this way.
	library := log.With(Component, "library").Handler()
	stdlog.SetOutput(slog.NewLogLogger(library, slog.LevelInfo).Writer())
	setupKlog(log)
	setupLogrus(log)
}

// OnFatal keeps klog's fatal messages from ending the process at once, with its datastore open:
// f is called and must begin an orderly stop, and the goroutine that logged the message ends.
// The API server logs such messages also when a stop interrupts its start.
//
// Fatal messages of components with a handler of their own go there: see [FatalOf].
func OnFatal(f func()) {
	klog.OsExit = func(int) {
		if own := fatalOwner(callers()); own != nil {
			own()
		} else {
			f()
		}
		goruntime.Goexit()
	}
}

// FatalOf registers f for the fatal messages of goroutines that run code of one of the
// packages, or of packages below them, in place of OnFatal's function.
func FatalOf(f func(), packages ...string) (release func()) {
	o := &owner{f, packages}
	owners.Lock()
	defer owners.Unlock()
	owners.list = append(owners.list, o)
	return func() {
		owners.Lock()
		defer owners.Unlock()
		owners.list = slices.DeleteFunc(owners.list, func(other *owner) bool { return other == o })
	}
}

type owner struct {
	f        func()
	packages []string
}

var owners struct {
	sync.Mutex
	list []*owner
}

// callers returns the names of the functions that the goroutine is in.
func callers() []string {
	pcs := make([]uintptr, 100)
	frames := goruntime.CallersFrames(pcs[:goruntime.Callers(2, pcs)])
	var names []string
	for {
		frame, more := frames.Next()
		names = append(names, frame.Function)
		if !more {
			return names
		}
	}
}

// fatalOwner returns the owner of a message that was logged in functions of these names.
func fatalOwner(functions []string) func() {
	owners.Lock()
	defer owners.Unlock()
	for _, name := range functions {
		for _, o := range owners.list {
			for _, p := range o.packages {
				if rest, ok := strings.CutPrefix(name, p); ok && (strings.HasPrefix(rest, ".") || strings.HasPrefix(rest, "/")) {
					return o.f
				}
			}
		}
	}
	return nil
}

// setupKlog gives klog our handler. It does not change how klog exits: see [OnFatal].
func setupKlog(log *slog.Logger) {
	h := &quieter{next: log.Handler(), component: "kubernetes", verbose: true}
	klog.SetSlogLogger(slog.New(h))
}

// quieter lowers the info lines of an embedded component to debug, and its verbose lines to
// trace, so that an idle node is silent at our info level. It adds the component's name to
// lines without one.
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
