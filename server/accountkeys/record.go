package accountkeys

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"kedge/server/peerrequests"
)

// Stage is how far a change has come. The package comment has them.
type Stage string

// The stages, in their order. Between changes there is none.
const (
	None       Stage = ""
	Distribute Stage = "distribute"
	Switch     Stage = "switch"
	Keep       Stage = "keep"
	Drop       Stage = "drop"
)

// recordKey is the key of the record in the datastore, outside of what the API serves.
const recordKey = "/kedge/service-account-keys"

// record is what the servers are to have. A cluster in which nothing was ever changed has no record.
type record struct {
	Stage     Stage                  `json:"stage,omitempty"`
	Keys      []string               `json:"keys"`               // IDs before the change, or without one; the first signs
	To        string                 `json:"to,omitempty"`       // ID of the new key; empty: it is not made yet
	Began     time.Time              `json:"began,omitzero"`     // of the last change
	SignsFrom time.Time              `json:"signsFrom,omitzero"` // likewise: nobody signs with the new key before
	Switched  time.Time              `json:"switched,omitzero"`  // likewise: all servers sign with the new key since then
	Ended     time.Time              `json:"ended,omitzero"`     // likewise; zero while it is carried out
	Waits     string                 `json:"waits,omitempty"`    // why the stage is not over
	Servers   []peerrequests.Address `json:"servers,omitzero"`   // of the servers, for one that starts without a key that it should have
}

// wanted are the keys that every server must have in this stage.
func (r *record) wanted() []string {
	switch {
	case r.Stage == None || r.To == "":
		return r.Keys
	case r.Stage == Distribute: // the one that signs stays first
		return slices.Concat(r.Keys[:1], []string{r.To}, r.Keys[1:])
	case r.Stage == Drop:
		return []string{r.To}
	}
	return slices.Concat([]string{r.To}, r.Keys)
}

// tolerated are the keys with which a server may start in this stage. In the first one that is what it had before: the new key
// may be lost with the server that has made it, since nobody signs with it yet.
func (r *record) tolerated() []string {
	if r.Stage == Distribute {
		return r.Keys
	}
	return r.wanted()
}

// old are the keys that the change replaces.
func (r *record) old() []string {
	if r.Stage == None {
		return nil
	}
	return r.Keys
}

// errUnderway is why a second change cannot begin.
var errUnderway = errors.New("the key of service accounts' tokens is being replaced; \"kedge service-account-key status\" shows how far it is")

// begin returns the record of a change that begins. current are the keys now, and published is for how long other clusters and
// services that verify tokens can learn of the new key before it signs.
func begin(before *record, current []string, published time.Duration, now time.Time) (*record, error) {
	r := &record{Stage: Distribute, Keys: current, Began: now, SignsFrom: now.Add(published)}
	if before != nil {
		if before.Stage != None {
			return nil, errUnderway
		}
		r.Keys, r.Servers = before.Keys, before.Servers
	}
	return r, nil
}

// next moves to the next stage.
func (r *record) next(now time.Time) {
	r.Waits = ""
	switch r.Stage {
	case Distribute:
		r.Stage = Switch
	case Switch:
		r.Stage, r.Switched = Keep, now
	case Keep:
		r.Stage = Drop
	case Drop:
		r.Keys, r.Stage, r.To, r.Ended = r.wanted(), None, "", now
	}
}

func (r *record) encode() ([]byte, error) { return json.Marshal(r) }

// decodeRecord returns nil without a value.
func decodeRecord(data []byte) (*record, error) {
	if data == nil {
		return nil, nil
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil || len(r.Keys) == 0 {
		return nil, fmt.Errorf("the datastore's record of the keys of service accounts' tokens cannot be read: %w", err)
	}
	return &r, nil
}
