// Package survivor compares what the servers hold that are left when the majority of a cluster is gone for good: "kedge recover"
// shows it on each of them, and serves again from the newest.
//
// The package is about the facts only: how they are read from a server's files is in package snapshots.
//
// Packages command, server/snapshots and assembly import it, and package main.
package survivor

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"kedge/internal/atomicfile"
)

// State is what a stopped server holds, by its own files.
type State struct {
	Server  string    `json:"server"`  // its name
	Cluster string    `json:"cluster"` // ID of the datastore's cluster, hexadecimal
	Read    time.Time `json:"read"`    // when the files were read, by this machine's clock

	Term      uint64 `json:"term"`      // of raft
	LastIndex uint64 `json:"lastIndex"` // of the last entry in the log
	LastTerm  uint64 `json:"lastTerm"`  // of that entry
	Committed uint64 `json:"committed"` // index up to which the server knows that entries are committed
	Revision  int64  `json:"revision"`  // of the last write in the database; later ones may be in the log

	// Changed is when the log was last changed, by this machine's clock.
	Changed time.Time `json:"changed"`
	// Lease is the latest Lease in the database; nil if there is none.
	Lease *Lease `json:"lease,omitempty"`

	Members []Member `json:"members"` // the server itself, too
	// NotAsked is the reason why it is not known whether other members answer; empty if it is.
	NotAsked string `json:"notAsked,omitempty"`
}

// Lease is a Lease object of Kubernetes, which its holder renews every few seconds.
type Lease struct {
	Name    string    `json:"name"` // NAMESPACE/NAME
	Holder  string    `json:"holder"`
	Renewed time.Time `json:"renewed"` // by the clock of the holder
}

// Member is a server in the datastore's list.
type Member struct {
	Name      string           `json:"name"`
	ID        string           `json:"id"` // hexadecimal
	Addresses []netip.AddrPort `json:"addresses"`
	Self      bool             `json:"self,omitempty"`
	Learner   bool             `json:"learner,omitempty"` // has no vote yet
	// Answers is the address at which the member answers on its peer port; not valid if it does not.
	Answers netip.AddrPort `json:"answers,omitzero"`
}

// ErrRefused means that a recovery would lose what another server may hold. It is done all the same with force.
var ErrRefused = errors.New("the recovery is refused")

// ErrImpossible means that there is nothing to recover here, with or without force.
var ErrImpossible = errors.New("nothing can be recovered")

// self returns the member that the state is of.
func (s State) self() Member {
	for _, m := range s.Members {
		if m.Self {
			return m
		}
	}
	return Member{}
}

// Compare returns a positive number if s is newer than o, as raft compares logs: the higher term of the last entry counts, then
// the longer log.
func (s State) Compare(o State) int {
	return cmp.Or(cmp.Compare(s.LastTerm, o.LastTerm), cmp.Compare(s.LastIndex, o.LastIndex))
}

// Check returns the reason why the datastore of s should not become that of the whole cluster; others are the states of other
// stopped servers. It is ErrImpossible or ErrRefused.
func (s State) Check(others []State) error {
	if len(s.Members) < 2 {
		return fmt.Errorf("%w: this server is the only member of its datastore, so no majority is missing; start kedge", ErrImpossible)
	}
	for _, o := range others {
		switch {
		case o.Cluster != s.Cluster:
			return fmt.Errorf("%w: the state of %s is that of another cluster, %s, and this server's is %s", ErrImpossible, o.Server, o.Cluster, s.Cluster)
		case o.self().ID == s.self().ID:
			return fmt.Errorf("%w: the state to compare with is that of this server itself; compare with those of other servers", ErrImpossible)
		}
	}
	for _, o := range others {
		if o.Compare(s) > 0 {
			return fmt.Errorf("%w: %s is newer: its last entry is %d of term %d, and that of this server %d of term %d; recover there",
				ErrRefused, o.Server, o.LastIndex, o.LastTerm, s.LastIndex, s.LastTerm)
		}
	}
	if s.NotAsked != "" {
		return fmt.Errorf("%w: whether other members answer is not known: %s", ErrRefused, s.NotAsked)
	}
	if err := s.checkAnswers(); err != nil {
		return err
	}
	if s.self().Learner {
		return fmt.Errorf("%w: this server has no vote yet, since it had not caught up with the others; recover another one if there is one", ErrRefused)
	}
	return nil
}

// checkAnswers returns an error if another member answers.
func (s State) checkAnswers() error {
	voters, alive := 0, 0
	var first Member
	for _, m := range s.Members {
		if m.Answers.IsValid() && !first.Answers.IsValid() {
			first = m
		}
		if m.Learner {
			continue
		}
		voters++
		if m.Self || m.Answers.IsValid() {
			alive++
		}
	}
	switch {
	case !first.Answers.IsValid():
		return nil
	case alive > voters/2:
		return fmt.Errorf("%w: %s answers at %s, and with this server there is a majority, %d of %d: start kedge here",
			ErrRefused, first.Name, first.Answers, alive, voters)
	}
	return fmt.Errorf("%w: %s answers at %s, and may be newer: stop kedge there, compare what \"kedge recover\" shows on both, and recover the newer one",
		ErrRefused, first.Name, first.Answers)
}

// ReadFile reads a state that "kedge recover -o json" has written.
func ReadFile(path string) (State, error) {
	const limit = 1 << 20
	data, err := atomicfile.ReadSmall(path, limit)
	if err != nil {
		return State{}, err
	}
	var s State
	if err := json.Unmarshal(data, &s); err != nil || s.Cluster == "" || s.self().ID == "" {
		return State{}, fmt.Errorf("%s is not what \"kedge recover -o json\" prints", path)
	}
	return s, nil
}
