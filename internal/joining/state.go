package joining

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
)

// State is what a machine that has joined keeps of a server's answer. Its file marks the machine as joined, and is therefore
// written after all other files that the machine needs, or has their contents in it ([State.Credentials]).
type State struct {
	// Server and Address are of an agent, as of the last answer: the URL of the server, and the machine's own address
	// towards the server. A witness has the URL.
	Server  string     `json:"server,omitempty"`
	Address netip.Addr `json:"address,omitzero"`

	Cluster Cluster `json:"cluster"`

	// Admission and Credentials are of a server, and the former of a witness, as of the answer to its join. The credentials are here only until they are
	// in files of their own.
	Admission   json.RawMessage `json:"admission,omitempty"`
	Credentials Credentials     `json:"credentials,omitempty"`
	// Restored is set if the server has the settings from a snapshot of the cluster: then there was no admission.
	Restored bool `json:"restored,omitempty"`
}

// StateFile is the path of the state of a machine with a role, in the role's directory.
func StateFile(role Role, dir string) string {
	if role == Agent {
		return filepath.Join(dir, "cluster.json")
	}
	return filepath.Join(dir, "joined.json")
}

// ReadState returns the state of a machine in the directory of its role, and false if the machine has not joined.
func ReadState(role Role, dir string) (s State, joined bool, err error) {
	path := StateFile(role, dir)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, false, nil
	}
	if err != nil {
		return s, false, err
	}
	if err = json.Unmarshal(data, &s); err == nil {
		err = s.check(role)
	}
	if err != nil {
		remedy := "remove it and start kedge with a token"
		if role != Agent {
			remedy = "restore it from a backup, or remove the data directory and join again"
		}
		return State{}, false, errorkind.Permanent(fmt.Errorf("read %s: %w; %s", path, err, remedy))
	}
	return s, true, nil
}

// check returns an error if the state lacks data without which a machine with the role cannot start.
func (s State) check(role Role) error {
	if err := s.Cluster.check(); err != nil {
		return err
	}
	if role != Agent && !s.Restored && (len(s.Admission) == 0 || bytes.Equal(s.Admission, []byte("null"))) {
		return errors.New("the admission to the datastore is missing")
	}
	return nil
}

// Write keeps the state in the directory of the role. The file of a server can have secrets in it.
func (s State) Write(role Role, dir string) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if role == Server {
		mode = 0o600
	}
	_, err = atomicfile.WriteIfChanged(StateFile(role, dir), append(data, '\n'), mode)
	return err
}
