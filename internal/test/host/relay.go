package host

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"kedge/internal/lifecycle"
)

const (
	// maxFrame is longer than every packet that the kernel passes to or from a tap.
	maxFrame = 65536 + 64
	// queueLimit bounds the packets under way in one direction. Further packets are lost, as
	// in the queue of a router.
	queueLimit = 1000
)

// relay carries frames in one direction. It ends when its files are closed.
type relay struct {
	from, to *os.File
	done     sync.WaitGroup

	mu    sync.Mutex
	fault Fault
	queue []frame // by due, oldest first
	wake  lifecycle.Wakeup
	ended bool
	free  time.Time // end of the transmission of the last frame at the fault's rate
	last  time.Time // arrival of the last frame that was not reordered
}

type frame struct {
	data []byte
	due  time.Time
}

func startRelay(from, to *os.File, f Fault) *relay {
	r := &relay{from: from, to: to, fault: f, wake: lifecycle.NewWakeup()}
	r.done.Add(2)
	go r.read()
	go r.write()
	return r
}

func (r *relay) set(f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = f
}

// wait returns when the relay has ended.
func (r *relay) wait() { r.done.Wait() }

func (r *relay) read() {
	defer r.done.Done()
	buf := make([]byte, maxFrame)
	for {
		n, err := r.from.Read(buf)
		if errors.Is(err, os.ErrClosed) || errors.Is(err, io.EOF) {
			break
		}
		if err == nil && n > 0 { // an error means that an interface is down for a while
			r.take(buf[:n], time.Now())
		}
	}
	r.mu.Lock()
	r.ended = true
	r.mu.Unlock()
	r.wake.Wake()
}

// take applies the fault to a frame.
func (r *relay) take(data []byte, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f := r.fault
	if f.Loss > 0 && rand.Float64() < f.Loss {
		return
	}
	copies := 1
	if f.Duplicate > 0 && rand.Float64() < f.Duplicate {
		copies = 2
	}
	for range copies {
		if len(r.queue) >= queueLimit {
			return
		}
		r.insert(frame{append([]byte(nil), data...), r.dueAt(f, len(data), now)})
	}
	r.wake.Wake()
}

// dueAt returns the time at which a frame arrives. Caller holds mu.
func (r *relay) dueAt(f Fault, size int, now time.Time) time.Time {
	due := now
	if f.Rate > 0 {
		if r.free.Before(now) {
			r.free = now
		}
		r.free = r.free.Add(time.Duration(float64(size) / float64(f.Rate) * float64(time.Second)))
		due = r.free
	}
	if f.Reorder > 0 && rand.Float64() < f.Reorder {
		return due
	}
	due = due.Add(f.Delay)
	if f.Jitter > 0 {
		due = due.Add(time.Duration((rand.Float64()*2 - 1) * float64(f.Jitter)))
	}
	if due.Before(r.last) {
		due = r.last
	}
	r.last = due
	return due
}

// insert keeps the queue in order. Caller holds mu.
func (r *relay) insert(f frame) {
	i := len(r.queue)
	for i > 0 && r.queue[i-1].due.After(f.due) {
		i--
	}
	r.queue = append(r.queue, frame{})
	copy(r.queue[i+1:], r.queue[i:])
	r.queue[i] = f
}

func (r *relay) write() {
	defer r.done.Done()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		r.mu.Lock()
		now, wait := time.Now(), time.Hour
		var due [][]byte
		for len(r.queue) > 0 {
			if wait = r.queue[0].due.Sub(now); wait > 0 {
				break
			}
			due = append(due, r.queue[0].data)
			r.queue = r.queue[1:]
			wait = time.Hour
		}
		ended := r.ended
		r.mu.Unlock()
		if ended {
			return
		}
		for _, data := range due {
			// A frame that the other side refuses is lost; its interface may be down.
			_, _ = r.to.Write(data)
		}
		timer.Reset(wait)
		select {
		case <-timer.C:
		case <-r.wake:
		}
	}
}
