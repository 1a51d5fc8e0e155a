package appliance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
)

// journalFormat grows when older versions could not work with a journal.
const journalFormat = 1

// journalName is the name of the journal in the data directory.
const journalName = "install.json"

// Journal has everything that an installation has made on the machine. It is written before each step.
type Journal struct {
	Format  int    `json:"format"`
	Version string `json:"version"` // of the kedge that was installed last
	Role    string `json:"role"`    // server or agent
	DataDir string `json:"dataDir"`
	RunDir  string `json:"runDir"`
	Config  string `json:"config"` // the configuration file
	Init    string `json:"init"`   // name of the service manager; empty if there is none
	// Restart says that the service does not use everything yet that was written: an interrupted installation has to
	// restart it.
	Restart bool    `json:"restart,omitempty"`
	Entries []Entry `json:"entries"`
}

// EntryKind is what an entry of the journal is about.
type EntryKind string

// The kinds of entries.
const (
	FileEntry      EntryKind = "file"
	LinkEntry      EntryKind = "link"
	DirEntry       EntryKind = "dir"       // removed if it is empty
	ServiceEntry   EntryKind = "service"   // the service was enabled or started; Path is its name
	ContextEntry   EntryKind = "context"   // of a kubeconfig; Target is its name
	GeneratedEntry EntryKind = "generated" // a file that the running kedge writes; removed with the data
)

// Entry is a file, link, directory or service that the installation has made.
type Entry struct {
	Kind    EntryKind `json:"kind"`
	Path    string    `json:"path"`
	Hash    string    `json:"hash,omitempty"`    // of the content that was written last
	Next    string    `json:"next,omitempty"`    // of the content that is being written
	Target  string    `json:"target,omitempty"`  // of a link
	Existed bool      `json:"existed,omitempty"` // the user's file, in which something was changed
}

// ErrNoJournal means that a data directory has no journal.
var ErrNoJournal = errors.New("kedge was not installed by \"kedge install\"")

// readJournal reads the journal in a data directory.
func (m Machine) readJournal(dataDir string) (*Journal, error) {
	path := m.path(filepath.Join(dataDir, journalName))
	data, err := atomicfile.ReadSmall(path, maxConfig)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%w: %s does not exist", ErrNoJournal, path)
	}
	if err != nil {
		return nil, err
	}
	j := &Journal{}
	if err := json.Unmarshal(data, j); err != nil {
		return nil, errorkind.Permanent(fmt.Errorf("read %s: %w; restore it, or remove it to install kedge anew with --force", path, err))
	}
	if j.Format > journalFormat {
		return nil, errorkind.Permanent(fmt.Errorf("%s was written by a newer kedge (%s); use that version or a later one", path, j.Version))
	}
	if err := j.check(dataDir); err != nil {
		return nil, errorkind.Permanent(fmt.Errorf("%s is damaged, or was moved: %w; restore it, or remove it to install kedge anew with --force", path, err))
	}
	return j, nil
}

// save writes the journal durably.
func (m Machine) save(j *Journal) error {
	if err := m.at("save the journal"); err != nil {
		return err
	}
	j.Format = journalFormat
	data, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return err
	}
	path := m.path(filepath.Join(j.DataDir, journalName))
	_, err = atomicfile.WriteIfChanged(path, append(data, '\n'), 0o600)
	return err
}

// find returns the entry of a path, or nil.
func (j *Journal) find(kind EntryKind, path string) *Entry {
	if j == nil {
		return nil
	}
	for i := range j.Entries {
		if e := &j.Entries[i]; e.Path == path && e.Kind == kind {
			return e
		}
	}
	return nil
}

// program returns the entry of the executable, or nil.
func (j *Journal) program() *Entry {
	if j == nil {
		return nil
	}
	for i := range j.Entries {
		if e := &j.Entries[i]; e.Kind == FileEntry && filepath.Base(e.Path) == serviceName && filepath.Base(filepath.Dir(e.Path)) == "bin" {
			return e
		}
	}
	return nil
}

// entry returns the entry of a path, which it adds if there is none.
func (j *Journal) entry(kind EntryKind, path string) *Entry {
	if e := j.find(kind, path); e != nil {
		return e
	}
	j.Entries = append(j.Entries, Entry{Kind: kind, Path: path})
	return &j.Entries[len(j.Entries)-1]
}

// drop removes an entry.
func (j *Journal) drop(kind EntryKind, path string) {
	j.Entries = slices.DeleteFunc(j.Entries, func(e Entry) bool { return e.Kind == kind && e.Path == path })
}

// wrote reports whether a content with a hash is one that the installation has written to the file.
func (e *Entry) wrote(hash string) bool {
	return e != nil && hash != "" && (hash == e.Hash || hash == e.Next)
}
