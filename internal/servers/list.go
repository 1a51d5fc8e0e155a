// Package servers is which servers of the cluster's API this machine knows, and the
// way to one of them that works: a list that outlives restarts, probes of the
// servers' health, and a transport for clients that moves to another server when the
// one in use fails. Clients see a connection that ends, and make a new one.
//
// It knows nothing of what is asked of the API, and finds no servers by itself:
// agent tells it. It may be imported by internal/joining, agent and main.
package servers

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync"

	"kedge/internal/atomicfile"
)

// List is the servers of the cluster, as last heard from the API. It is kept in a
// file. All methods may be called at any time.
type List struct {
	path     string
	fallback []string

	mu      sync.Mutex // guards what follows
	urls    []string
	hints   []string // where servers may be, the latest last
	changed chan struct{}
}

// maxHints is how many hints are kept: anybody may give them.
const maxHints = 4

// Load reads the list that is kept at path, which need not exist. fallback are the
// URLs with which the administrator has named servers: the last resort, which may
// lead to any of them, and whose names are resolved anew each time.
func Load(path string, fallback ...string) (*List, error) {
	l := &List{path: path, fallback: fallback, changed: make(chan struct{})}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &l.urls)
	}
	if err == nil {
		err = valid(l.urls)
	}
	if err != nil {
		return nil, fmt.Errorf("read the list of servers: %w; remove %s, --server is enough to start with", err, path)
	}
	return l, nil
}

func valid(urls []string) error {
	for _, u := range urls {
		if _, err := hostPort(u); err != nil {
			return err
		}
	}
	return nil
}

// hostPort is where to connect for a URL.
func hostPort(server string) (string, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return "", fmt.Errorf("%q is not the URL of a server", server)
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	return net.JoinHostPort(u.Hostname(), port), nil
}

// Set replaces the servers by those that the API names, if they are others, and
// writes them down. None at all are no news: somebody must have said so.
func (l *List) Set(urls []string) error {
	urls = slices.Compact(slices.Sorted(slices.Values(urls)))
	if len(urls) == 0 {
		return nil
	}
	if err := valid(urls); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if slices.Equal(urls, l.urls) {
		return nil
	}
	l.urls, l.hints = urls, nil
	close(l.changed)
	l.changed = make(chan struct{})
	data, err := json.Marshal(urls)
	if err == nil {
		_, err = atomicfile.WriteIfChanged(l.path, append(data, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("keep the list of servers: %w", err)
	}
	return nil
}

// Known are the servers that the API has named, and a channel that is closed when
// there are others, or another hint.
func (l *List) Known() (urls []string, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.urls), l.changed
}

// Hint says that there may be a server at a URL. It is tried when no other works, and
// forgotten when the API names others than before.
func (l *List) Hint(server string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if valid([]string{server}) != nil || slices.Contains(slices.Concat(l.urls, l.fallback, l.hints), server) {
		return
	}
	l.hints = append(l.hints, server)
	l.hints = l.hints[max(0, len(l.hints)-maxHints):]
	close(l.changed)
	l.changed = make(chan struct{})
}

// Ports are those that the servers are known to listen on.
func (l *List) Ports() []uint16 {
	var out []uint16
	for _, u := range l.All() {
		address, err := hostPort(u)
		if err != nil {
			continue // it was refused when it came
		}
		_, text, err := net.SplitHostPort(address)
		if n, bad := strconv.ParseUint(text, 10, 16); err == nil && bad == nil && !slices.Contains(out, uint16(n)) {
			out = append(out, uint16(n))
		}
	}
	return out
}

// Fallback are the servers that the administrator has named, and then the hints.
func (l *List) Fallback() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Concat(l.fallback, l.hints)
}

// All are the known servers and then the last resort, each once.
func (l *List) All() []string {
	all, _ := l.Known()
	for _, u := range l.Fallback() {
		if u != "" && !slices.Contains(all, u) {
			all = append(all, u)
		}
	}
	return all
}
