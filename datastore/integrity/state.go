package integrity

import (
	"encoding/json"
	"path/filepath"
)

// State is what the files of a store say about how far its member has come.
type State struct {
	Identity Identity
	Members  []Member // in the database
	Term     uint64   // of raft, which increases with every election

	LastIndex, LastTerm uint64 // of the last entry in the log
	Committed           uint64 // index up to which the files say that entries are committed; more may be
	Revision            int64  // of the last write in the database; later ones may be in the log
}

// Member is a member in the database.
type Member struct {
	ID      string // hexadecimal
	Name    string // empty if the member has never started
	Learner bool   // has no vote
}

// ReadState reads the files of the store in dir, which is closed, checks them, and changes nothing. An error that is a
// *[Damage] names the damaged file. visit is called with every write to a key that is in the database, in order, with bytes that are valid
// until it returns; it may be nil.
func ReadState(dir string, known Known, visit func(key, value []byte)) (State, error) {
	c := &contents{path: filepath.Join(dir, databaseFile), buckets: map[string]int{}, visit: visit}
	if err := c.read(); err != nil {
		return State{}, err
	}
	l, err := readLog(filepath.Join(dir, logDir), known)
	if err != nil {
		return State{}, err
	}
	if err := l.agrees(c, filepath.Join(dir, logDir)); err != nil {
		return State{}, err
	}
	s := State{
		Identity: l.identity, Term: l.term, LastIndex: l.last, LastTerm: l.lastTerm,
		Committed: max(l.commit, c.index), Revision: int64(c.newest),
	}
	for i, id := range c.members {
		m := struct {
			Name    string `json:"name"`
			Learner bool   `json:"isLearner"`
		}{}
		if err := json.Unmarshal(c.memberData[i], &m); err != nil {
			return State{}, damaged(c.path, "has a member %q that cannot be decoded", id)
		}
		s.Members = append(s.Members, Member{ID: id, Name: m.Name, Learner: m.Learner})
	}
	return s, nil
}
