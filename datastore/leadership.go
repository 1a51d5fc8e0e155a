package datastore

import "sync"

// leadership publishes who leads.
type leadership struct {
	mu      sync.Mutex // guards what follows
	now     Leadership
	changed chan struct{} // closed at the next change
}

// Leadership returns who leads the store, and a channel that is closed when that has changed. It can be called
// at any time: nobody leads a store that is not open.
func (s *Store) Leadership() (Leadership, <-chan struct{}) { return s.leadership.get() }

func newLeadership() *leadership { return &leadership{changed: make(chan struct{})} }

func (l *leadership) get() (Leadership, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now, l.changed
}

func (l *leadership) set(now Leadership) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now == now {
		return
	}
	l.now = now
	close(l.changed)
	l.changed = make(chan struct{})
}
