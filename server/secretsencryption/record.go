package secretsencryption

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"kedge/server/peerrequests"
)

// Operation is a change of how Secrets are encrypted.
type Operation string

// The operations.
const (
	Rotate  Operation = "rotate"  // a new key replaces the old one
	Enable  Operation = "enable"  // Secrets are encrypted, with a new key
	Disable Operation = "disable" // Secrets are not encrypted any more
)

// Stage is how far a change has come. The package comment has them.
type Stage string

// The stages, in their order. Between changes there is none.
const (
	None       Stage = ""
	Distribute Stage = "distribute"
	Switch     Stage = "switch"
	Rewrite    Stage = "rewrite"
	Drop       Stage = "drop"
)

// recordKey is the key of the record in the datastore, outside of what the API serves.
const recordKey = "/kedge/secrets-encryption"

// record is what the servers are to have. It has no key in it. A cluster in which nothing was ever changed has no record.
type record struct {
	Operation Operation `json:"operation"` // that is carried out, or the last one
	Stage     Stage     `json:"stage,omitempty"`
	Providers []keyID   `json:"providers"`        // before the change, or without one
	To        keyID     `json:"to,omitzero"`      // the provider that will write; its key is not made yet if it has no fingerprint
	LastKey   int       `json:"lastKey"`          // the highest number in a key's name so far
	Began     time.Time `json:"began,omitzero"`   // of the last change
	Ended     time.Time `json:"ended,omitzero"`   // likewise; zero while it is carried out
	Done      int       `json:"done"`             // Secrets that To has written, from the rewriting on
	Total     int       `json:"total"`            // Secrets; 0 before the rewriting
	Compacted bool      `json:"compacted"`        // the history with the old values was deleted
	Waits     string    `json:"waits,omitempty"`  // why the stage is not over
	Servers   []address `json:"servers,omitzero"` // of the servers, for one that starts without a key that it should have
}

// address is where a server's API can be reached.
type address = peerrequests.Address

// wanted are the providers that every server must have in this stage.
func (r *record) wanted() []keyID {
	others := slices.DeleteFunc(slices.Clone(r.Providers), func(id keyID) bool { return id == r.To })
	switch r.Stage {
	case Distribute:
		if r.To.Print == "" && r.To.Name != plain {
			return r.Providers
		}
		// The one that writes stays first.
		return slices.Concat(others[:1], []keyID{r.To}, others[1:])
	case Switch, Rewrite:
		return slices.Concat([]keyID{r.To}, others)
	case Drop:
		return slices.Concat([]keyID{r.To}, slices.DeleteFunc(others, func(id keyID) bool { return id.Name != plain }))
	}
	return r.Providers
}

// tolerated are the providers with which a server may start in this stage. In the first one that is what it had before: the new
// key may be lost with the server that has made it, since nobody writes with it yet.
func (r *record) tolerated() []keyID {
	if r.Stage == Distribute {
		return r.Providers
	}
	return r.wanted()
}

// begin returns the record of a change that begins. current are the providers now.
func begin(op Operation, before *record, current []keyID, now time.Time) (*record, error) {
	r := &record{Operation: op, Stage: Distribute, Providers: current, Began: now}
	for _, id := range current {
		r.LastKey = max(r.LastKey, id.number())
	}
	if before != nil {
		if before.Stage != None {
			return nil, fmt.Errorf("a change of the encryption is being carried out (%s); \"kedge secrets-encrypt status\" shows how far it is", before.Operation)
		}
		r.Providers, r.LastKey, r.Servers = before.Providers, max(r.LastKey, before.LastKey), before.Servers
	}
	on := r.Providers[0].Name != plain
	switch {
	case op == Rotate && !on:
		return nil, errors.New("Secrets are not encrypted, so there is no key to replace; \"kedge secrets-encrypt enable\" encrypts them with a new one")
	case op == Enable && on:
		return nil, fmt.Errorf("Secrets are encrypted already, with %s; \"kedge secrets-encrypt rotate\" replaces the key", r.Providers[0].Name)
	case op == Disable && !on:
		return nil, errors.New("Secrets are not encrypted already")
	case op == Disable:
		r.To = keyID{Name: plain}
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
		r.Stage = Rewrite
	case Rewrite:
		r.Stage = Drop
	case Drop:
		r.Providers, r.Stage, r.To, r.Ended = r.wanted(), None, keyID{}, now
	}
}

func (r *record) encode() ([]byte, error) { return json.Marshal(r) }

// decodeRecord returns nil without a value.
func decodeRecord(data []byte) (*record, error) {
	if data == nil {
		return nil, nil
	}
	var r record
	if err := json.Unmarshal(data, &r); err != nil || len(r.Providers) == 0 {
		return nil, fmt.Errorf("the datastore's record of the encryption of Secrets cannot be read: %w", err)
	}
	return &r, nil
}
