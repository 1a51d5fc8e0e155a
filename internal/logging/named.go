package logging

import (
	"context"
	"log/slog"
)

// named adds kedge's own name to lines without a component, which are those of package main.
type named struct {
	next slog.Handler
	has  bool // an attribute already names the component
}

const ourselves = "kedge"

func (n named) Enabled(ctx context.Context, l slog.Level) bool { return n.next.Enabled(ctx, l) }

func (n named) Handle(ctx context.Context, r slog.Record) error {
	has := n.has
	r.Attrs(func(a slog.Attr) bool {
		has = has || a.Key == Component
		return !has
	})
	if !has {
		r = r.Clone()
		r.AddAttrs(slog.String(Component, ourselves))
	}
	return n.next.Handle(ctx, r)
}

func (n named) WithAttrs(attrs []slog.Attr) slog.Handler {
	for _, a := range attrs {
		n.has = n.has || a.Key == Component
	}
	n.next = n.next.WithAttrs(attrs)
	return n
}

// WithGroup names the component first: what comes later is in the group.
func (n named) WithGroup(name string) slog.Handler {
	if !n.has {
		n.has, n.next = true, n.next.WithAttrs([]slog.Attr{slog.String(Component, ourselves)})
	}
	n.next = n.next.WithGroup(name)
	return n
}
