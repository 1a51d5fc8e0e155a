package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kedge/appliance/parameters"
	"kedge/internal/datadir"
	"kedge/launcher/bootguard"
)

// Uninstall describes the removal of an installation.
type Uninstall struct {
	DataDir string
	Purge   bool // the data and the configuration too
	// KillAll kills the node's containers and removes their kernel objects.
	KillAll func(context.Context) error
	// LinkPrefixes returns the prefixes of the names of a node's network interfaces.
	LinkPrefixes func(node string) []string
	// DropContext removes a context from a kubeconfig.
	DropContext func(file, name string) error
}

// removeAction is what a step of a removal does.
type removeAction string

const (
	stopService    removeAction = "stop"
	disableService removeAction = "disable"
	killContainers removeAction = "kill containers"
	restoreKernel  removeAction = "restore kernel parameters"
	dropContext    removeAction = "remove context"
	removeFile     removeAction = "remove"
	removeEmptyDir removeAction = "remove directory if it is empty"
	removeData     removeAction = "remove data"
	forget         removeAction = "remove the journal"
	reloadService  removeAction = "reload"
)

type removeStep struct {
	do   removeAction
	path string
	name string        // of a context
	time time.Duration // limit
}

// String describes the step for "--dry-run".
func (s removeStep) String() string {
	switch s.do {
	case stopService, disableService:
		return string(s.do) + " the service " + serviceName
	case reloadService:
		return "make the service manager read its files"
	case killContainers:
		return "kill the containers and remove their kernel objects"
	case restoreKernel:
		return string(s.do)
	case dropContext:
		return "remove the context " + s.name + " from " + s.path
	}
	return string(s.do) + " " + s.path
}

// Limits of the steps. A file system that does not answer must not hang the removal.
const (
	removeLimit = 20 * time.Second
	killLimit   = 2 * time.Minute
	dataLimit   = 5 * time.Minute
)

// Removal is a removal that was planned and not executed.
type Removal struct {
	Notes []string // for the user

	in       Uninstall
	machine  Machine
	journal  *Journal
	steps    []removeStep
	nodeName string
	stay     []string // notes about kernel parameters that are not restored
}

// PlanRemoval plans the removal of an installation. It changes nothing.
func (m Machine) PlanRemoval(in Uninstall) (*Removal, error) {
	j, err := m.readJournal(in.DataDir)
	if err != nil {
		return nil, err
	}
	r := &Removal{in: in, machine: m, journal: j}
	found := map[string]Found{}
	for _, e := range j.Entries {
		if e.Kind == ServiceEntry || e.Kind == ContextEntry {
			continue
		}
		err := limited(context.Background(), removeLimit, "look at "+e.Path, func(context.Context) error {
			f, err := m.look(e.Path)
			found[e.Path] = f
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	r.nodeName, err = datadir.NodeName(m.path(in.DataDir))
	if err != nil && !in.Purge {
		return nil, err
	}
	r.steps, r.Notes = planRemoval(*j, found, in.Purge)
	return r, nil
}

// planRemoval returns the steps that remove what a journal has, and notes about what stays. The executable comes late, so
// that an interrupted removal can be completed with it, and the configuration file and the journal last: they say where
// the data is.
func planRemoval(j Journal, found map[string]Found, purge bool) (steps []removeStep, notes []string) {
	if j.Init != "" {
		steps = append(steps, removeStep{do: stopService, time: stopLimit + quickLimit}, removeStep{do: disableService, time: quickLimit})
	}
	steps = append(steps, removeStep{do: killContainers, time: killLimit}, removeStep{do: restoreKernel, time: quickLimit})
	var files, last, dirs []removeStep
	units := false
	for _, e := range j.Entries {
		f := found[e.Path]
		remove := removeStep{do: removeFile, path: e.Path, time: removeLimit}
		switch {
		case e.Kind == ContextEntry:
			steps = append(steps, removeStep{do: dropContext, path: e.Path, name: e.Target, time: removeLimit})
		case e.Kind == DirEntry && f.Exists:
			dirs = append(dirs, removeStep{do: removeEmptyDir, path: e.Path, time: removeLimit})
		case e.Kind == ServiceEntry || !f.Exists:
		case e.Kind == GeneratedEntry && purge:
			files = append(files, remove)
		case e.Kind == LinkEntry && (f.Kind != fs.ModeSymlink || f.Target != e.Target):
			notes = append(notes, fmt.Sprintf("%s stays: it is not kedge's link any more", e.Path))
		case e.Kind == LinkEntry:
			files = append(files, remove)
		case e.Kind != FileEntry:
		case e.Path == j.Config && purge:
			last = append(last, remove)
		case e.Path == j.Config, filepath.Base(e.Path) == tokenName && filepath.Dir(e.Path) == filepath.Dir(j.Config):
			if purge {
				files = append(files, remove)
				continue
			}
			notes = append(notes, fmt.Sprintf("%s stays, for the data that stays; --purge removes both", e.Path))
		case !purge && (e.Existed || !e.wrote(f.Hash)):
			notes = append(notes, fmt.Sprintf("%s stays: it was changed since \"kedge install\" wrote it; --purge removes it", e.Path))
		case filepath.Base(e.Path) == serviceName && f.Mode.Perm() == 0o755 && strings.HasSuffix(filepath.Dir(e.Path), "bin"):
			last = slices.Insert(last, 0, remove)
		default:
			files = append(files, remove)
			units = true
		}
	}
	steps = append(steps, files...)
	if j.Init != "" && units {
		steps = append(steps, removeStep{do: reloadService, time: quickLimit})
	}
	steps = append(steps, removeStep{do: removeData, path: j.RunDir, time: dataLimit})
	if purge {
		steps = append(steps, removeStep{do: removeData, path: j.DataDir, time: dataLimit})
	} else {
		notes = append(notes, fmt.Sprintf("%s stays, with the data of the node; --purge removes it", j.DataDir))
	}
	steps = append(steps, last...)
	steps = append(steps, removeStep{do: forget, path: filepath.Join(j.DataDir, journalName), time: removeLimit})
	slices.Reverse(dirs) // a folder was recorded after its parent
	if etc := filepath.Dir(defaultConfig); purge && filepath.Dir(j.Config) == etc && !slices.ContainsFunc(dirs, func(s removeStep) bool { return s.path == etc }) {
		dirs = append(dirs, removeStep{do: removeEmptyDir, path: etc, time: removeLimit}) // a server has created it
	}
	return append(steps, dirs...), notes
}

// String describes the removal for "--dry-run".
func (r *Removal) String() string {
	var out strings.Builder
	for _, s := range r.steps {
		fmt.Fprintln(&out, s)
	}
	return out.String()
}

// Apply executes the removal. A step that fails does not prevent the others, except that nothing is removed while kedge
// or a container runs.
func (r *Removal) Apply(ctx context.Context) error {
	lock, err := r.machine.alone(r.in.DataDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	var errs []error
	for _, s := range r.steps {
		if (s.do == forget || s.do == removeFile && s.path == r.journal.Config) && len(errs) > 0 {
			break // the next run needs the journal, and the configuration, which says where the journal is
		}
		r.machine.Say(s.String())
		err := r.machine.at(s.String())
		if err == nil {
			err = limited(ctx, s.time, s.String(), func(ctx context.Context) error { return r.do(ctx, s) })
		}
		if err == nil {
			continue
		}
		errs = append(errs, err)
		if s.do == stopService || s.do == killContainers || ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

func (r *Removal) do(ctx context.Context, s removeStep) error {
	m := r.machine
	switch s.do {
	case stopService:
		return m.Manager.Stop(ctx)
	case disableService:
		return m.Manager.Disable(ctx)
	case reloadService:
		return m.Manager.Reload(ctx)
	case killContainers:
		return r.in.KillAll(ctx)
	case restoreKernel:
		notes, err := parameters.Restore(m.Root, r.journal.RunDir)
		r.stay = notes
		return err
	case dropContext:
		return r.in.DropContext(s.path, s.name)
	case removeData:
		if s.path == r.journal.DataDir {
			return m.removeNamed(ctx, s.path, dataNames())
		}
		return m.removeNamed(ctx, s.path, runNames())
	case removeEmptyDir:
		err := unix.Rmdir(m.path(s.path))
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EBUSY) {
			return nil // something of the user's is in it
		}
		return err
	}
	if s.do == forget { // an upgrade of what is removed goes on no more
		if err := bootguard.End(m.path(r.journal.DataDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	err := os.Remove(m.path(s.path))
	if s.do == forget && r.in.Purge {
		_ = unix.Rmdir(m.path(r.journal.DataDir)) // with something of the user's in it, it stays
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// removeNamed removes names in a directory, and the directory if it is empty then. Other names are not kedge's: the
// directory may be one that the user has for other things too.
func (m Machine) removeNamed(ctx context.Context, dir string, names []string) error {
	var errs []error
	for _, pattern := range names {
		found, err := filepath.Glob(filepath.Join(m.path(dir), pattern))
		errs = append(errs, err)
		for _, path := range found {
			errs = append(errs, removeTree(ctx, path))
		}
	}
	_ = unix.Rmdir(m.path(dir))
	return errors.Join(errs...)
}

// limited runs a step with a time limit, also if it does not notice the end of its context: a system call on a file system
// that does not answer cannot be interrupted.
func limited(ctx context.Context, limit time.Duration, what string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	select {
	case err := <-done:
		if errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("%s: no end within %s", what, limit)
		}
		return err
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return fmt.Errorf("%s: no end within %s; a file system that does not answer may be the cause", what, limit)
		}
		return ctx.Err()
	}
}
