// Package servers connects a node to the servers of the cluster's API. It has a list of
// servers that survives restarts, probes of their health, and a transport that fails over to
// another server when the current server fails. Clients see that a connection ends, and make
// a new one.
//
// The package knows nothing of the requests, and discovers no servers by itself: its callers
// update the list. It may be imported by internal/joining, server/directory, agent and assembly.
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

// List is the list of the cluster's servers, as last read from the API. It is kept in a file.
// Its methods may be called from several goroutines.
type List struct {
	path     string
	fallback []string

	mu      sync.Mutex // guards the fields below
	urls    []string
	hints   []string // URLs of possible servers, the latest last
	changed chan struct{}
}

// maxHints bounds the hints: they are not authenticated.
const maxHints = 4

// Load reads the list in the file path, which need not exist. fallback are the servers' URLs
// from the administrator. They are the last resort, may lead to any server, and their names
// are resolved anew each time.
//
// A damaged file is treated as missing and reported by damaged: the first server that is
// reached sends a new list.
func Load(path string, fallback ...string) (list *List, damaged, err error) {
	list, err = load(path, fallback...)
	if !errors.Is(err, errDamaged) {
		return list, nil, err
	}
	return &List{path: path, fallback: fallback, changed: make(chan struct{})}, err, nil
}

var errDamaged = errors.New("the list of servers is damaged")

func load(path string, fallback ...string) (*List, error) {
	l := &List{path: path, fallback: fallback, changed: make(chan struct{})}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return l, nil
	}
	if err != nil {
		return nil, err
	}
	if err = json.Unmarshal(data, &l.urls); err == nil {
		err = valid(l.urls)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", errDamaged, path, err)
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

// hostPort returns the address to connect to for a URL.
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

// Set replaces the servers by those from the API, if they differ, and saves them. An empty
// list is ignored: some server must have sent it.
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
		return fmt.Errorf("save the list of servers: %w", err)
	}
	return nil
}

// Known returns the servers from the API, and a channel that is closed when the servers or the
// hints change.
func (l *List) Known() (urls []string, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.urls), l.changed
}

// Hint adds the URL of a possible server. It is tried when no other server works, and dropped
// when the servers from the API change.
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

// Ports returns the known ports of the servers.
func (l *List) Ports() []uint16 {
	var out []uint16
	for _, u := range l.All() {
		address, err := hostPort(u)
		if err != nil {
			continue // cannot happen: URLs are checked when they are added
		}
		_, text, err := net.SplitHostPort(address)
		if n, bad := strconv.ParseUint(text, 10, 16); err == nil && bad == nil && !slices.Contains(out, uint16(n)) {
			out = append(out, uint16(n))
		}
	}
	return out
}

// Fallback returns the administrator's servers, and then the hints.
func (l *List) Fallback() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Concat(l.fallback, l.hints)
}

// All returns the known servers and then those of Fallback, each once.
func (l *List) All() []string {
	all, _ := l.Known()
	for _, u := range l.Fallback() {
		if u != "" && !slices.Contains(all, u) {
			all = append(all, u)
		}
	}
	return all
}
