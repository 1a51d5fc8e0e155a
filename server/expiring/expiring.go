// Package expiring holds values that are large, rarely needed and quickly made. A value is made on request, and
// dropped when it was not requested for a while.
//
// It is not a cache of changing data: a value depends on nothing that changes. Package server imports it.
package expiring

import (
	"sync"
	"time"
)

// Value is a value that expires. Its methods are safe for concurrent use.
type Value[T any] struct {
	build func() (T, error)
	keep  time.Duration

	mu      sync.Mutex // guards the fields below
	made    bool
	value   T
	timer   *time.Timer
	lastUse time.Time
}

// New returns a value that build makes, in one call at a time. It is kept for the given time after the last
// request.
func New[T any](keep time.Duration, build func() (T, error)) *Value[T] {
	return &Value[T]{build: build, keep: keep}
}

// Get returns the value, and makes it if necessary. It returns an error of build without keeping it, so that
// the next call tries again.
func (v *Value[T]) Get() (T, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !v.made {
		value, err := v.build()
		if err != nil {
			var none T
			return none, err
		}
		v.value, v.made = value, true
		v.timer = time.AfterFunc(v.keep, v.expire)
	}
	v.lastUse = time.Now()
	return v.value, nil
}

// expire drops the value, unless it was requested meanwhile; then the timer is set again.
func (v *Value[T]) expire() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if rest := v.keep - time.Since(v.lastUse); rest > 0 {
		v.timer.Reset(rest)
		return
	}
	var none T
	v.value, v.made = none, false
}
