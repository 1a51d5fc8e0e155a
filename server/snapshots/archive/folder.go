package archive

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"kedge/internal/atomicfile"
)

const (
	// Suffix is that of the files of archives.
	Suffix = ".kedge"
	// DatabaseSuffix is that of files with a database only, which are saved before upgrades.
	DatabaseSuffix = ".db"
	// Scheduled begins the names of snapshots that the schedule takes, and OnDemand those of others without a name.
	Scheduled, OnDemand = "scheduled", "on-demand"

	timeLayout = "20060102T150405Z"
)

// Listed is a snapshot in a folder.
type Listed struct {
	Path   string
	Size   int64  // of the file, in bytes
	Header Header // zero for a database only, and if Err is set
	// DatabaseOnly means that the file holds a database and nothing else. Taken is then the time of the file.
	DatabaseOnly bool
	Taken        time.Time
	Err          error // the file cannot be read
}

// List returns the snapshots in a folder, oldest first. A folder that does not exist is empty.
func List(dir string) ([]Listed, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var all []Listed
	for _, e := range entries {
		name := e.Name()
		database := strings.HasSuffix(name, DatabaseSuffix)
		if strings.HasPrefix(name, ".") || !database && !strings.HasSuffix(name, Suffix) || !e.Type().IsRegular() {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		l := Listed{Path: filepath.Join(dir, name), Size: info.Size(), DatabaseOnly: database, Taken: info.ModTime()}
		if !database {
			if l.Header, l.Err = HeaderOf(l.Path); l.Err == nil {
				l.Taken = l.Header.Taken
			}
		}
		all = append(all, l)
	}
	slices.SortStableFunc(all, func(a, b Listed) int { return a.Taken.Compare(b.Taken) })
	return all, nil
}

// validPrefix is what the name of a snapshot may begin with.
var validPrefix = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}$`)

// CheckPrefix returns an error if the name of a snapshot cannot begin with prefix.
func CheckPrefix(prefix string) error {
	if !validPrefix.MatchString(prefix) {
		return fmt.Errorf("%q cannot begin the name of a snapshot: use at most 100 letters, digits, dots, dashes and underscores", prefix)
	}
	return nil
}

// FileName is the name of a snapshot's file.
func FileName(prefix, node string, taken time.Time) string {
	return prefix + "-" + node + "-" + taken.UTC().Format(timeLayout) + Suffix
}

// Prefix returns what the name of a snapshot of a node begins with, and false for the name of another file.
func Prefix(path, node string) (string, bool) {
	name, ok := strings.CutSuffix(filepath.Base(path), Suffix)
	if !ok || len(name) < len(timeLayout) {
		return "", false
	}
	if _, err := time.Parse(timeLayout, name[len(name)-len(timeLayout):]); err != nil {
		return "", false
	}
	return strings.CutSuffix(name[:len(name)-len(timeLayout)], "-"+node+"-")
}

// Old returns all but the newest snapshots of a node whose names begin with prefix, sorted. nodes has the server of each snapshot
// by its name, which may be a path in one folder. The times in the names tell which are the newest.
func Old(nodes map[string]string, prefix, node string, keep int) []string {
	var own []string
	for name, of := range nodes {
		if p, ok := Prefix(name, node); ok && p == prefix && of == node {
			own = append(own, name)
		}
	}
	slices.Sort(own)
	return own[:max(0, len(own)-keep)]
}

// Prune removes all but the newest snapshots of a node whose names begin with prefix, and returns the paths of those that it
// has removed. A file that cannot be read stays.
func Prune(dir, prefix, node string, keep int) (removed []string, err error) {
	all, err := List(dir)
	if err != nil {
		return nil, err
	}
	nodes := map[string]string{}
	for _, l := range all {
		if l.Err == nil {
			nodes[l.Path] = l.Header.Node
		}
	}
	for _, path := range Old(nodes, prefix, node, keep) {
		if rmErr := os.Remove(path); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
			continue
		}
		removed = append(removed, path)
	}
	if len(removed) > 0 {
		err = errors.Join(err, atomicfile.SyncDir(dir))
	}
	return removed, err
}
