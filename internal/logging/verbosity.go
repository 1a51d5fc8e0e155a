package logging

import (
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"path"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"k8s.io/klog/v2"
)

// verbosity selects verbose lines of Kubernetes' components that are shown at any level of the
// log, as their flags -v and --vmodule do.
type verbosity struct {
	all   int            // lines up to this verbosity; zero, the default, shows none
	files map[string]int // verbosity of source files, by patterns of their names
}

var (
	raising sync.Mutex // serializes changes of verbose
	verbose atomic.Pointer[verbosity]
)

// Verbose shows lines of Kubernetes' components up to the verbosity all, and lines of source
// files up to the verbosity of a pattern that matches their names without ".go". The process
// has one log, so the highest of several components' verbosities wins.
func Verbose(all int, files map[string]int) error {
	raising.Lock()
	defer raising.Unlock()
	next := verbosity{all: all, files: map[string]int{}}
	if now := verbose.Load(); now != nil {
		next = verbosity{all: max(all, now.all), files: maps.Clone(now.files)}
	}
	for pattern, n := range files {
		if _, err := path.Match(pattern, ""); err != nil {
			return fmt.Errorf("vmodule: invalid file pattern %q: %w", pattern, err)
		}
		next.files[pattern] = max(n, next.files[pattern])
	}
	// klog checks its own verbosity before it calls our handler; contextual loggers do not.
	own := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(own)
	var modules []string
	highest := func(a, b string) int { return next.files[b] - next.files[a] } // klog takes the first match
	for _, pattern := range slices.SortedFunc(maps.Keys(next.files), highest) {
		modules = append(modules, fmt.Sprint(pattern, "=", next.files[pattern]))
	}
	if err := own.Set("v", strconv.Itoa(next.all)); err != nil {
		return fmt.Errorf("v: %w", err)
	}
	if err := own.Set("vmodule", strings.Join(modules, ",")); err != nil {
		return fmt.Errorf("vmodule: %w", err)
	}
	verbose.Store(&next)
	return nil
}

// of returns the verbosity of a level.
func of(l slog.Level) int { return max(0, int(slog.LevelInfo-l)) }

// may reports whether any line of level l is shown.
func (v *verbosity) may(l slog.Level) bool {
	if v == nil || l >= slog.LevelWarn {
		return false
	}
	n := of(l)
	if v.all > 0 && n <= v.all {
		return true
	}
	for _, most := range v.files {
		if n <= most {
			return true
		}
	}
	return false
}

// shows reports whether r is.
func (v *verbosity) shows(r slog.Record) bool {
	if !v.may(r.Level) {
		return false
	}
	n := of(r.Level)
	if v.all > 0 && n <= v.all {
		return true
	}
	frame, _ := goruntime.CallersFrames([]uintptr{r.PC}).Next()
	file := strings.TrimSuffix(path.Base(frame.File), ".go")
	for pattern, most := range v.files {
		if ok, err := path.Match(pattern, file); err == nil && ok && n <= most {
			return true
		}
	}
	return false
}
