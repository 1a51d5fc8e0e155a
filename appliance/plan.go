package appliance

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"kedge/internal/errorkind"
)

// File is a file that an installation wants.
type File struct {
	Path   string
	Data   []byte
	Source string // the file that is copied in place of Data
	// SourceAt and SourceSize are the stretch of Source that is copied; with a size of 0 it is the whole file.
	SourceAt, SourceSize int64
	Hash                 string // of the content
	Mode                 fs.FileMode
	// Edited means that Data was made from the present content, so that it is right whoever has changed the file.
	Edited bool
	// Once means that a present file stays as it is.
	Once bool
	// Optional means that the installation goes on without the file if somebody else's is there, whatever its content is: a
	// package of the distribution may have put it there, and a removal of kedge leaves it there.
	Optional bool
	Restarts bool   // a running kedge must be restarted to use it
	What     string // for messages: "a unit"
	Remedy   string // how the user can keep a change of the file
	Previous string // where the present content is kept before it is replaced
}

// Link is a symbolic link that an installation wants.
type Link struct{ Path, Target string }

// LinkMode says what happens to a command of another program with the name of a link.
type LinkMode string

// The modes of links.
const (
	LinksAuto  LinkMode = "auto"  // no link if PATH has a command of that name
	LinksSkip  LinkMode = "skip"  // no links
	LinksForce LinkMode = "force" // links replace links
)

// Found is what is at a path.
type Found struct {
	Kind   fs.FileMode // its type bits; 0 for a regular file
	Exists bool
	Hash   string // of a regular file
	Mode   fs.FileMode
	Target string // of a link
}

// current is the state of the machine that a plan depends on.
type current struct {
	journal *Journal // nil if there is none
	found   map[string]Found
	service ServiceState
	// commands has the paths of commands in PATH, by their names.
	commands map[string]string
}

// wanted is the state that an installation wants.
type wanted struct {
	journal   Journal // without its entries
	dirs      []string
	files     []File
	links     []Link
	linkMode  LinkMode
	generated []string // files that the running kedge writes
	service   bool     // there is a service manager
	force     bool
	restart   bool // something else than the files needs a restart
}

// action is what a step does.
type action string

const (
	makeDir  action = "create directory"
	write    action = "write"
	copyFile action = "copy"
	makeLink action = "link"
	reload   action = "reload"
	enable   action = "enable"
	start    action = "start"
	restart  action = "restart"
)

// step is one change of the machine.
type step struct {
	do     action
	path   string
	file   File   // of write and copyFile
	target string // of makeLink
	adopt  bool   // the file existed, and was the user's
	record bool   // the machine is right, and only the journal lacks it
}

// String describes the step for "--dry-run".
func (s step) String() string {
	switch s.do {
	case reload:
		return "make the service manager read its files"
	case enable, start, restart:
		return string(s.do) + " the service " + serviceName
	case makeLink:
		return fmt.Sprintf("link %s to %s", s.path, s.target)
	case copyFile:
		return fmt.Sprintf("copy %s to %s", s.file.Source, s.path)
	}
	return string(s.do) + " " + s.path
}

// plan returns the steps from the current state to the wanted one, and notes for the user. It changes nothing.
func plan(cur current, want wanted) (steps []step, notes []string, err error) {
	if j := cur.journal; j != nil {
		if err := sameInstallation(*j, want.journal); err != nil {
			return nil, nil, err
		}
	}
	for _, dir := range want.dirs {
		switch f := cur.found[dir]; {
		case !f.Exists:
			steps = append(steps, step{do: makeDir, path: dir})
		case f.Kind != fs.ModeDir && f.Kind != fs.ModeSymlink:
			return nil, nil, errorkind.Permanent(fmt.Errorf("%s is not a directory; remove it", dir))
		}
	}
	var restarts bool
	for _, f := range want.files {
		s, note, err := planFile(cur, want, f)
		if err != nil {
			return nil, nil, err
		}
		if note != "" {
			notes = append(notes, note)
		}
		if s.do != "" {
			steps, restarts = append(steps, s), restarts || f.Restarts && !s.record
		}
	}
	for _, l := range want.links {
		s, note, err := planLink(cur, want, l)
		if err != nil {
			return nil, nil, err
		}
		if note != "" {
			notes = append(notes, note)
		}
		if s.do != "" {
			steps = append(steps, s)
		}
	}
	return append(steps, planService(cur, want, restarts || want.restart)...), notes, nil
}

// sameInstallation returns an error if an installation would become another one.
func sameInstallation(old, made Journal) error {
	switch {
	case old.Role != made.Role:
		return errorkind.Permanent(fmt.Errorf("kedge is installed as %s on this machine, and an installation cannot become %s; \"kedge uninstall --purge\" removes it with its data, then install it anew",
			withArticle(old.Role), withArticle(made.Role)))
	case old.DataDir != made.DataDir:
		return errorkind.Permanent(fmt.Errorf("kedge is installed with the data directory %s, which cannot be changed to %s; \"kedge uninstall\" removes the installation and keeps the data, move the directory then and install kedge anew", old.DataDir, made.DataDir))
	case old.Config != made.Config:
		return errorkind.Permanent(fmt.Errorf("kedge is installed with the configuration file %s, which cannot be changed to %s; \"kedge uninstall\" removes the installation and keeps the data, install kedge anew then", old.Config, made.Config))
	}
	return nil
}

func withArticle(role string) string {
	if role == "agent" {
		return "an agent"
	}
	return "a " + role
}

// planFile plans one file.
func planFile(cur current, want wanted, f File) (step, string, error) {
	s := step{do: write, path: f.Path, file: f}
	if f.Source != "" {
		s.do = copyFile
	}
	found, entry := cur.found[f.Path], cur.journal.find(FileEntry, f.Path)
	foreign := func(what string) (step, string, error) {
		if f.Optional {
			return step{}, fmt.Sprintf("%s is %s and stays as it is", f.Path, what), nil
		}
		remedy := "give --force to replace it, or remove it"
		if f.Remedy != "" {
			remedy = f.Remedy + ", and give --force to replace the file"
		}
		return step{}, "", errorkind.Permanent(fmt.Errorf("%s is %s; %s", f.Path, what, remedy))
	}
	switch {
	case !found.Exists:
		return s, "", nil
	case found.Kind != 0 && found.Kind != fs.ModeSymlink && f.Optional:
		return foreign("not a file")
	case found.Kind != 0 && found.Kind != fs.ModeSymlink:
		return step{}, "", errorkind.Permanent(fmt.Errorf("%s is not a file; remove it", f.Path))
	case found.Kind == fs.ModeSymlink && !want.force:
		return foreign("a link to " + found.Target)
	case f.Once, f.Optional && entry == nil && !want.force && found.Hash == f.Hash:
		return step{}, "", nil
	case found.Kind == 0 && found.Hash == f.Hash:
		right := found.Mode.Perm() == f.Mode.Perm()
		if right && entry != nil && entry.Hash == f.Hash {
			return step{}, "", nil
		}
		s.adopt = entry == nil && f.Edited
		// A program that was put there by hand is one that a running kedge does not use yet.
		s.record = right && (entry.wrote(f.Hash) || f.Edited)
		return s, "", nil
	case f.Edited:
		s.adopt = entry == nil
		return s, "", nil
	case entry.wrote(found.Hash), want.force:
		return s, "", nil
	case entry != nil:
		return foreign("changed since \"kedge install\" wrote it")
	}
	what := f.What
	if what == "" {
		what = "a file"
	}
	return foreign(what + " that \"kedge install\" did not write")
}

// planLink plans one link.
func planLink(cur current, want wanted, l Link) (step, string, error) {
	s := step{do: makeLink, path: l.Path, target: l.Target}
	found, entry := cur.found[l.Path], cur.journal.find(LinkEntry, l.Path)
	name := filepath.Base(l.Path)
	switch {
	case want.linkMode == LinksSkip:
		return step{}, "", nil
	case found.Exists && found.Kind == fs.ModeSymlink && found.Target == l.Target:
		if entry == nil {
			s.record = true
			return s, "", nil
		}
		return step{}, "", nil
	case found.Exists && found.Kind == fs.ModeSymlink && (entry != nil && entry.Target == found.Target || want.linkMode == LinksForce):
		return s, "", nil
	case found.Exists && want.linkMode == LinksForce:
		return step{}, "", errorkind.Permanent(fmt.Errorf("%s is not a link, and --links=force replaces only links; remove it, or give --links=skip", l.Path))
	case found.Exists:
		return step{}, fmt.Sprintf("%s exists and stays as it is; \"kedge %s\" is the same command", l.Path, name), nil
	case want.linkMode == LinksForce:
		return s, "", nil
	}
	if other := cur.commands[name]; other != "" && other != l.Path {
		return step{}, fmt.Sprintf("no link %s, because %s exists; \"kedge %s\" is the same command", l.Path, other, name), nil
	}
	return s, "", nil
}

// planService plans the service after the files. restarts means that a running kedge must be restarted to use them.
func planService(cur current, want wanted, restarts bool) (steps []step) {
	if !want.service {
		return nil
	}
	interrupted := cur.journal != nil && cur.journal.Restart
	if restarts || interrupted {
		steps = append(steps, step{do: reload})
	}
	if !cur.service.Enabled {
		steps = append(steps, step{do: enable})
	}
	switch {
	case !cur.service.Active:
		steps = append(steps, step{do: start})
	case restarts || interrupted:
		steps = append(steps, step{do: restart})
	}
	return steps
}

// has reports whether there is a step of one of the kinds.
func has(steps []step, kinds ...action) bool {
	return slices.ContainsFunc(steps, func(s step) bool { return slices.Contains(kinds, s.do) })
}
