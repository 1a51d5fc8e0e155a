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

	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/launcher/bootguard"
)

// Install describes the installation that a user wants.
type Install struct {
	Role    string // server or agent
	Version string
	Program string // the executable to install
	// ProgramAt and ProgramSize are the stretch of Program that is installed; with a size of 0 it is the whole file.
	ProgramAt, ProgramSize int64

	Config          string // the configuration file
	DataDir, RunDir string
	Settings        []Setting // for the configuration file
	// Token is for joining, or of a first server the secret that it keeps.
	Token string
	// Joins says that the machine joins others. The token is then of no use after it.
	Joins   bool
	Witness bool // the server is a witness
	// Kubeconfig is the file that the server writes; empty for an agent and for a witness.
	Kubeconfig string

	BinDir      string // empty for the first usual folder that can be written
	Links       LinkMode
	Force       bool
	Environ     []string          // of the caller
	Completions map[string]string // scripts by the name of the shell
	// Contents makes contents of a bundle in the data directory those that the node reads at its start; nil if there are none, or
	// if they are already.
	Contents func() error
}

// Planned is an installation that was planned and not executed.
type Planned struct {
	Notes []string // for the user

	in            Install
	machine       Machine
	journal       *Journal
	steps         []step
	before, after []byte // the configuration file
	bin           string
}

// maxConfig is the maximum size of files that are edited.
const maxConfig = 1 << 20

// Plan compares the machine with the installation that is wanted. It changes nothing.
func (m Machine) Plan(ctx context.Context, in Install) (*Planned, error) {
	p := &Planned{in: in, machine: m}
	var cur current
	var err error
	cur.journal, err = m.readJournal(in.DataDir)
	if errors.Is(err, ErrNoJournal) {
		if err = m.elsewhere(in); err == nil {
			err = m.ownDirectories(in)
		}
	}
	if err != nil {
		return nil, err
	}
	bin, err := m.binDir(in, cur.journal)
	if err != nil {
		return nil, err
	}
	p.bin = filepath.Join(bin, serviceName)
	want, err := p.want(ctx)
	if err != nil {
		return nil, err
	}
	if err := m.probe(ctx, &cur, want); err != nil {
		return nil, err
	}
	steps, notes, err := plan(cur, want)
	if err != nil {
		return nil, err
	}
	p.steps, p.Notes = steps, append(p.Notes, notes...)
	if p.journal = cur.journal; p.journal == nil {
		p.journal = &Journal{}
	}
	entries, restart := p.journal.Entries, p.journal.Restart
	*p.journal = want.journal
	p.journal.Entries, p.journal.Restart = entries, restart
	if !slices.Contains(filepath.SplitList(os.Getenv("PATH")), bin) {
		p.Notes = append(p.Notes, fmt.Sprintf("%s is not in PATH; call kedge as %s", bin, p.bin))
	}
	return p, m.room(in, p)
}

// IsUpgrade reports whether an installation replaces the executable of a node that has run already: that goes by way of
// [Machine.Stage], which can go back.
func (m Machine) IsUpgrade(in Install) bool {
	j, err := m.readJournal(in.DataDir)
	if err != nil || j.program() == nil || in.BinDir != "" && filepath.Clean(in.BinDir) != filepath.Dir(j.program().Path) {
		return false
	}
	if node, err := datadir.NodeName(m.path(in.DataDir)); err != nil || node == "" {
		return false
	}
	installed, err := m.look(j.program().Path)
	if err != nil || !installed.Exists || installed.Kind != 0 || !j.program().wrote(installed.Hash) {
		return false // missing, or somebody else's: the plan says what to do
	}
	sum, err := hashPart(in.Program, in.ProgramAt, in.ProgramSize)
	return err == nil && sum != installed.Hash
}

// SameRole returns an error if a data directory has an installation of another role.
func (m Machine) SameRole(dataDir, role string) error {
	j, err := m.readJournal(dataDir)
	if errors.Is(err, ErrNoJournal) {
		return nil
	}
	if err != nil {
		return err
	}
	made := *j
	made.Role = role
	return sameInstallation(*j, made)
}

// elsewhere returns an error if the configuration file names another data directory with an installation.
func (m Machine) elsewhere(in Install) error {
	data, err := os.ReadFile(m.path(in.Config))
	if err != nil {
		return nil // nothing is configured; the command has reported other errors
	}
	root, err := rootOf(data)
	if err != nil || root == nil {
		return err
	}
	at := keyIn(root, "data-dir")
	dir := "/var/lib/kedge"
	if at >= 0 {
		dir = root.Content[at+1].Value
	}
	if dir == in.DataDir {
		return nil
	}
	j, err := m.readJournal(dir)
	if errors.Is(err, ErrNoJournal) {
		return nil
	}
	if err != nil {
		return err
	}
	return sameInstallation(*j, Journal{Role: in.Role, DataDir: in.DataDir, Config: in.Config})
}

// binDir returns the folder of the executable.
func (m Machine) binDir(in Install, j *Journal) (string, error) {
	if in.BinDir != "" {
		if !filepath.IsAbs(in.BinDir) {
			return "", errorkind.BadSetting("bin-dir", " %q is not an absolute path", in.BinDir)
		}
		return filepath.Clean(in.BinDir), m.writable(in.BinDir)
	}
	dirs := []string{"/usr/local/bin", "/opt/bin"}
	for _, dir := range dirs { // an installation stays where it is
		if j.find(FileEntry, filepath.Join(dir, serviceName)) != nil {
			return dir, m.writable(dir)
		}
	}
	if e := j.program(); e != nil {
		return filepath.Dir(e.Path), nil
	}
	var errs []error
	for _, dir := range dirs {
		err := m.writable(dir)
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// writable returns an error if a folder, or the folder in which it would be created, cannot be written.
func (m Machine) writable(dir string) error {
	for at := dir; ; at = filepath.Dir(at) {
		err := unix.Access(m.path(at), unix.W_OK)
		if st, none := os.Stat(m.path(at)); none == nil && !st.IsDir() {
			return errorkind.Permanent(fmt.Errorf("%s is not a directory; choose another folder with --bin-dir", at))
		}
		switch {
		case err == nil:
			return nil
		case (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR)) && at != "/":
			continue
		case errors.Is(err, unix.EROFS):
			return errorkind.Permanent(fmt.Errorf("%s is on a read-only file system; choose another folder with --bin-dir", dir))
		}
		return errorkind.Permanent(fmt.Errorf("%s cannot be written: %w; choose another folder with --bin-dir", dir, err))
	}
}

// want returns the wanted state of the machine.
func (p *Planned) want(ctx context.Context) (wanted, error) {
	m, in := p.machine, p.in
	want := wanted{
		journal:  Journal{Version: in.Version, Role: in.Role, DataDir: in.DataDir, RunDir: in.RunDir, Config: in.Config, Init: m.Manager.Name()},
		linkMode: in.Links, force: in.Force, service: m.Manager.Name() != "", restart: in.Contents != nil,
	}
	etc := filepath.Dir(in.Config)
	environment := filepath.Join(etc, "service.env")
	sum, err := hashPart(in.Program, in.ProgramAt, in.ProgramSize)
	if err != nil {
		return want, err
	}
	// During the trial of an upgrade the executable has its place already, or gets it when it is proven.
	if _, err := bootguard.ReadTrial(m.path(in.DataDir)); errors.Is(err, fs.ErrNotExist) {
		want.files = append(want.files, File{Path: p.bin, Source: in.Program, SourceAt: in.ProgramAt, SourceSize: in.ProgramSize, Hash: sum, Mode: 0o755, Restarts: true, What: "a program",
			Previous: filepath.Join(in.DataDir, "previous", serviceName)})
	} else if err != nil {
		return want, err
	}
	for _, name := range []string{"kubectl", "ctr"} {
		want.links = append(want.links, Link{Path: filepath.Join(filepath.Dir(p.bin), name), Target: serviceName})
	}
	want.files = append(want.files, m.completions(in.Completions)...)
	config, err := p.config(etc)
	if err != nil {
		return want, err
	}
	want.files = append(want.files, config...)
	present, err := m.read(environment)
	if err != nil {
		return want, err
	}
	if data := environmentFile(present, in.Environ); len(data) > 0 {
		want.files = append(want.files, File{Path: environment, Data: data, Mode: 0o600, Edited: true, Restarts: true})
	}
	command := []string{p.bin, in.Role}
	if in.Config != defaultConfig {
		command = append(command, "--config="+in.Config)
	}
	want.files = append(want.files, m.Manager.Files(newService(command, environment))...)
	for i := range want.files {
		if f := &want.files[i]; f.Hash == "" {
			f.Hash = hashOf(f.Data)
		}
	}
	want.dirs = m.missingDirs(want.files)
	if in.Kubeconfig != "" {
		want.generated = append(want.generated, in.Kubeconfig)
	}
	return want, ctx.Err()
}

// defaultConfig is the configuration file that kedge reads without a flag.
const defaultConfig = "/etc/kedge/config.yaml"

// config returns the configuration file with the settings, and the file with the token.
func (p *Planned) config(etc string) (files []File, err error) {
	in, m := p.in, p.machine
	settings := slices.Clone(in.Settings)
	token := filepath.Join(etc, tokenName)
	joined, err := m.joined(in)
	if err != nil {
		return nil, err
	}
	switch {
	case in.Token != "" && in.Joins && joined:
		p.Notes = append(p.Notes, "the machine has joined before, and needs no token")
	case in.Token != "":
		files = append(files, File{Path: token, Data: []byte(in.Token + "\n"), Mode: 0o600, Restarts: true})
		settings = append(settings, Setting{Key: "token-file", Values: []string{token}}, Setting{Key: "token", Drop: true})
	default: // an earlier installation's
		data, err := m.read(token)
		if err != nil {
			return nil, err
		}
		if data != nil {
			files = append(files, File{Path: token, Data: data, Mode: 0o600, Edited: true})
		}
	}
	if p.before, err = m.read(in.Config); err != nil {
		return nil, err
	}
	if p.after, err = EditConfig(p.before, settings); err != nil {
		return nil, errorkind.Permanent(fmt.Errorf("%s: %w", in.Config, err))
	}
	if len(p.after) == 0 && len(p.before) == 0 {
		return files, nil
	}
	mode := fs.FileMode(0o600) // it may get secrets
	if st, err := os.Stat(m.path(in.Config)); err == nil {
		mode = st.Mode().Perm()
	}
	return append(files, File{Path: in.Config, Data: p.after, Mode: mode, Edited: true, Restarts: true}), nil
}

// tokenName is the name of the file with the token, beside the configuration file.
const tokenName = "token"

// joined reports whether the machine is a member of the cluster.
func (m Machine) joined(in Install) (bool, error) {
	role := joining.Role(in.Role)
	if in.Witness {
		role = joining.Witness
	}
	_, joined, err := joining.ReadState(role, m.path(filepath.Join(in.DataDir, string(role))))
	return joined, err
}

// read reads a file that may be missing.
func (m Machine) read(path string) ([]byte, error) {
	data, err := atomicfile.ReadSmall(m.path(path), maxConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}

// completions returns the files of shells whose folders are there.
func (m Machine) completions(scripts map[string]string) (files []File) {
	for _, c := range []struct{ shell, dir, name string }{
		{"bash", "/usr/share/bash-completion/completions", "kedge"},
		{"zsh", "/usr/share/zsh/site-functions", "_kedge"},
		{"zsh", "/usr/share/zsh/vendor-completions", "_kedge"},
		{"fish", "/usr/share/fish/vendor_completions.d", "kedge.fish"},
	} {
		st, err := os.Stat(m.path(c.dir))
		if err != nil || !st.IsDir() || scripts[c.shell] == "" || m.writable(c.dir) != nil {
			continue
		}
		files = append(files, File{Path: filepath.Join(c.dir, c.name), Data: []byte(scripts[c.shell]), Mode: 0o644, Optional: true})
	}
	return files
}

// missingDirs returns the folders of files that do not exist, parents first.
func (m Machine) missingDirs(files []File) (dirs []string) {
	var add func(dir string)
	add = func(dir string) {
		if _, err := os.Stat(m.path(dir)); !errors.Is(err, fs.ErrNotExist) || slices.Contains(dirs, dir) {
			return
		}
		add(filepath.Dir(dir))
		dirs = append(dirs, dir)
	}
	for _, f := range files {
		add(filepath.Dir(f.Path))
	}
	return dirs
}

// probe reads the current state of everything that is wanted.
func (m Machine) probe(ctx context.Context, cur *current, want wanted) (err error) {
	cur.found, cur.commands = map[string]Found{}, map[string]string{}
	paths := slices.Clone(want.dirs)
	for _, f := range want.files {
		paths = append(paths, f.Path)
	}
	for _, l := range want.links {
		paths = append(paths, l.Path)
		for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
			path := filepath.Join(dir, filepath.Base(l.Path))
			if cur.commands[filepath.Base(l.Path)] == "" && filepath.IsAbs(dir) && executable(m.path(path)) {
				cur.commands[filepath.Base(l.Path)] = path
			}
		}
	}
	for _, path := range paths {
		if cur.found[path], err = m.look(path); err != nil {
			return err
		}
	}
	if want.service {
		cur.service, err = m.Manager.State(ctx)
	}
	return err
}

// room returns an error if a file system has no room for the executable.
func (m Machine) room(in Install, p *Planned) error {
	if !has(p.steps, copyFile) {
		return nil
	}
	size := in.ProgramSize
	if size == 0 {
		st, err := os.Stat(in.Program)
		if err != nil {
			return err
		}
		size = st.Size()
	}
	const spare = 8 << 20
	for dir := filepath.Dir(p.bin); ; dir = filepath.Dir(dir) {
		var free unix.Statfs_t
		err := unix.Statfs(m.path(dir), &free)
		if errors.Is(err, unix.ENOENT) && dir != "/" {
			continue
		}
		if err == nil && free.Bavail*uint64(free.Bsize) < uint64(size+spare) {
			return fmt.Errorf("the file system of %s has %d MiB free, and kedge needs %d MiB there; free some space, or choose another folder with --bin-dir",
				dir, free.Bavail*uint64(free.Bsize)>>20, (size+spare)>>20)
		}
		return err
	}
}

// Config returns the configuration file as it will be.
func (p *Planned) Config() []byte { return p.after }

// Changes reports whether anything of the machine is to be changed.
func (p *Planned) Changes() bool {
	return slices.ContainsFunc(p.steps, func(s step) bool { return !s.record })
}

// Restarts reports whether the service will be started or restarted.
func (p *Planned) Restarts() bool { return has(p.steps, start, restart) }

// Program is the path of the installed executable.
func (p *Planned) Program() string { return p.bin }

// Command is the command that runs the node, for machines without a service manager.
func (p *Planned) Command() string {
	words := []string{p.bin, p.in.Role}
	if p.in.Config != defaultConfig {
		words = append(words, "--config="+p.in.Config)
	}
	return strings.Join(quoted(words, shellWord), " ")
}

// String describes the plan for "--dry-run".
func (p *Planned) String() string {
	var out strings.Builder
	for _, s := range p.steps {
		if s.record {
			continue
		}
		fmt.Fprintln(&out, s)
		if s.path == p.in.Config && s.do == write {
			for line := range strings.Lines(Diff(p.before, p.after)) {
				out.WriteString("  " + line)
			}
		}
	}
	return out.String()
}

// Apply executes the plan.
func (p *Planned) Apply(ctx context.Context) error {
	m := p.machine
	dir := m.path(p.in.DataDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return explain(step{path: p.in.DataDir + "/"}, err)
	}
	lock, err := m.alone(p.in.DataDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if p.in.Kubeconfig != "" {
		p.journal.entry(GeneratedEntry, p.in.Kubeconfig)
	}
	if m.Manager.Name() == "OpenRC" {
		for _, suffix := range []string{"", ".1", ".2", ".3"} {
			p.journal.entry(GeneratedEntry, newService([]string{"", ""}, "").Log+suffix)
		}
	}
	for _, dir := range m.missingDirs([]File{{Path: kubeletPlugins + "/kubelet.sock"}}) {
		p.journal.entry(DirEntry, dir)
	}
	if err := p.contents(); err != nil {
		return err
	}
	if err := m.execute(ctx, p.journal, p.steps); err != nil {
		return explain(step{path: p.in.DataDir + "/"}, err)
	}
	return nil
}

// kubeletPlugins is the folder for device plugins, which the kubelet creates; an installation removes what is empty of it.
const kubeletPlugins = "/var/lib/kubelet/device-plugins"

// contents puts the contents of a bundle into use. The journal says before that a restart is due, which an interrupted run would
// otherwise forget.
func (p *Planned) contents() error {
	if p.in.Contents == nil {
		return nil
	}
	m := p.machine
	if p.Restarts() {
		p.journal.Restart = true
		if err := m.save(p.journal); err != nil {
			return explain(step{path: p.in.DataDir + "/"}, err)
		}
	}
	return errors.Join(m.at("contents"), p.in.Contents())
}

// DropToken removes the token of a machine that has joined: first the key of the configuration file, so that kedge never
// looks for a file that is gone.
func (p *Planned) DropToken() error {
	m, in, j := p.machine, p.in, p.journal
	token := filepath.Join(filepath.Dir(in.Config), tokenName)
	if joined, err := m.joined(in); err != nil || !joined || !in.Joins {
		return err
	}
	if e := j.find(FileEntry, token); e == nil || e.Existed { // a file of the user's
		return nil
	}
	before, err := m.read(in.Config)
	if err != nil {
		return err
	}
	root, err := rootOf(before)
	if err != nil {
		return err
	}
	if root != nil {
		if at := keyIn(root, "token-file"); at >= 0 && root.Content[at+1].Value == token {
			after, err := EditConfig(before, []Setting{{Key: "token-file", Drop: true}})
			if err != nil {
				return err
			}
			entry := j.entry(FileEntry, in.Config)
			entry.Next = hashOf(after)
			st, err := os.Stat(m.path(in.Config))
			if err = errors.Join(err, m.save(j)); err != nil {
				return err
			}
			if err := errors.Join(m.at("drop token-file"), atomicfile.Write(m.path(in.Config), after, st.Mode().Perm())); err != nil {
				return err
			}
			entry.Hash, entry.Next = entry.Next, ""
		}
	}
	if err := errors.Join(m.at("remove the token"), os.Remove(m.path(token))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	j.drop(FileEntry, token)
	return m.save(j)
}

// RecordContext records a context in a kubeconfig of a user before it is added.
func (p *Planned) RecordContext(file, name string) error {
	p.journal.entry(ContextEntry, file).Target = name
	return p.machine.save(p.journal)
}
