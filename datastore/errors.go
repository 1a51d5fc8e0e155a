package datastore

import "errors"

var (
	// ErrInUse means that another process has the data directory open.
	ErrInUse = errors.New("the data directory is in use by another process")

	// ErrNotServing means that the store is not open: not yet, or no more.
	ErrNotServing = errors.New("the datastore is not serving")

	// ErrFailed means that the store met a fault after which it must not go on, such as a disk that refuses
	// to write. What was acknowledged before is on disk; the process has to start again.
	ErrFailed = errors.New("the datastore failed")

	// ErrNoSpace means that the database file has reached its quota, so that writes are refused.
	ErrNoSpace = errors.New("the datastore has reached its quota")
)
