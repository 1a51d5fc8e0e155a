// Package integrity checks whether the files of a store are as they were written. etcd does not check them: a flipped bit in
// the database makes one of its goroutines panic, which ends the process, or makes an object disappear silently.
//
// After an orderly stop, a seal holds the checksums of all files, so that every changed bit is found. After any other
// end there is no seal. Then the log is verified by its own checksums, and the structure of the database by the rules of
// its format: every page, key and value.
//
// The package changes nothing but the seal, and the end of a log that a power cut has torn. It does not open the store.
//
// Only package datastore may import it.
package integrity

import "fmt"

// Damage is a file that differs from what was written.
type Damage struct {
	File string // its path
	What string // the damage, as a predicate whose subject is the file
}

func (d *Damage) Error() string { return d.File + " " + d.What }

func damaged(file, format string, args ...any) *Damage {
	return &Damage{File: file, What: fmt.Sprintf(format, args...)}
}
