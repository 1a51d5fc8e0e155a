package appliance

import (
	"context"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/launcher/bootguard"
)

// Upgrade describes an upgrade of a node that a user wants. See docs/upgrade.md for how it goes on.
type Upgrade struct {
	File string // the new executable, which the caller has verified
	// FileAt and FileSize are the stretch of File that is the executable; with a size of 0 it is the whole file.
	FileAt, FileSize int64

	Role            string // server or agent
	HasNode         bool   // the server is a node too
	Config          string // the configuration file
	DataDir, RunDir string
	Kubeconfig      string // that a server writes; empty for an agent

	// Observe is for how long the new version must be healthy without interruption.
	Observe time.Duration
	// Patience is the time without progress after which a start has failed.
	Patience time.Duration
	// Rollback says that the executable is an earlier one.
	Rollback bool
}

// DefaultObserve is for how long a new version must be healthy unless the user wants another time.
const DefaultObserve = 30 * time.Second

// DefaultPatience is the time without progress after which a start has failed, unless the user wants another.
const DefaultPatience = 2 * time.Minute

// Build is what "kedge version" says of an executable.
type Build struct {
	Version    string `json:"version"`
	Commit     string `json:"commit"`
	Kubernetes string `json:"kubernetes"`
	Platform   string `json:"platform"`   // for example linux/amd64
	DataFormat int    `json:"dataFormat"` // of the data directory
	// Watches says that the executable has "kedge upgrade watch" and the boot guard.
	Watches bool   `json:"watches,omitempty"`
	Hash    string `json:"hash"` // of the executable
}

// String has the commit too, unless the version is named after it.
func (b Build) String() string {
	short := b.Commit[:min(12, len(b.Commit))]
	if strings.HasPrefix(b.Version, short) {
		return b.Version
	}
	return fmt.Sprintf("%s (%s)", b.Version, short)
}

// trialDetails is what the watching of a trial needs to know.
type trialDetails struct {
	Begin      time.Time     `json:"begin"`
	From       Build         `json:"from"`
	To         Build         `json:"to"`
	Program    string        `json:"program"` // that the service starts
	Role       string        `json:"role"`
	HasNode    bool          `json:"hasNode"`
	Config     string        `json:"config"`
	RunDir     string        `json:"runDir"`
	Kubeconfig string        `json:"kubeconfig,omitempty"`
	Observe    time.Duration `json:"observe"`
	Patience   time.Duration `json:"patience"`
	Containers []container   `json:"containers,omitempty"` // that must go on running
	// GuardIsNew says that the executable of before does not know the boot guard: the new one is in its place from the
	// beginning, and a copy of it is the base.
	GuardIsNew bool `json:"guardIsNew,omitempty"`
	// Snapshot is the datastore before the trial; nil if none was saved.
	Snapshot *control.SavedSnapshot `json:"snapshot,omitempty"`
}

// maxStarts is how often a new version is started without becoming healthy.
const maxStarts = 3

// savedNames are the files and folders of the data directory that a new format could convert. Images, the containers' own
// files and volumes are not among them: no version converts them.
var savedNames = []string{"kedge.json", "server", "agent"}

// Errors of upgrades.
var (
	// ErrSameVersion means that the executable is the installed one.
	ErrSameVersion = errors.New("this executable is installed already")
	// ErrOnTrial means that an upgrade has no verdict yet.
	ErrOnTrial = errors.New("an upgrade is on trial")
	// ErrNoUpgrade means that there is nothing to show or to roll back.
	ErrNoUpgrade = errors.New("there was no upgrade")
)

// Staged is an upgrade that was checked and is ready to begin.
type Staged struct {
	From, To Build
	Notes    []string

	machine Machine
	in      Upgrade
	id      string
	details trialDetails
	lock    *os.File
}

// Stage checks an upgrade, and copies the new executable into the data directory. The node is not touched. Until Begin or
// Discard no other command changes the installation.
func (m Machine) Stage(ctx context.Context, in Upgrade) (*Staged, error) {
	lock, err := m.alone(in.DataDir)
	if err != nil {
		return nil, err
	}
	s, err := m.stage(ctx, in)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	s.lock = lock
	return s, nil
}

func (m Machine) stage(ctx context.Context, in Upgrade) (*Staged, error) {
	if err := m.noTrial(in.DataDir); err != nil {
		return nil, err
	}
	begin := time.Now().UTC()
	s := &Staged{machine: m, in: in, id: begin.Format("20060102T150405Z") + "-" + strconv.Itoa(os.Getpid())}
	program, err := s.program(ctx)
	if err != nil {
		return nil, err
	}
	if err := checkMachineCode(in); err != nil {
		return nil, err
	}
	if err := s.check(ctx, program); err != nil {
		return nil, errors.Join(err, s.Discard())
	}
	s.details = trialDetails{
		Begin: begin.Truncate(time.Second), From: s.From, To: s.To, Program: program, Role: in.Role, HasNode: in.HasNode,
		Config: in.Config, RunDir: in.RunDir, Kubeconfig: in.Kubeconfig, Observe: in.Observe, Patience: in.Patience,
	}
	return s, nil
}

// candidate is the path of the copy of the new executable. It is another one for each upgrade: the running kedge may have been
// started from that of the last one.
func (s *Staged) candidate() string {
	return bootguard.Path(s.in.DataDir, bootguard.CandidatePrefix+s.id)
}

// check copies the new executable, and checks that the step to it is possible.
func (s *Staged) check(ctx context.Context, program string) (err error) {
	m := s.machine
	if err := s.copyCandidate(); err != nil {
		return err
	}
	if s.From, err = m.describe(ctx, program, nil); err != nil {
		return err
	}
	if s.To, err = m.describe(ctx, s.candidate(), s.unpackInto()); err != nil {
		return err
	}
	if s.From.Hash == s.To.Hash && s.in.Rollback {
		return errorkind.Permanent(errors.New("there is nothing to go back to: this node runs the version before its last upgrade already"))
	}
	if s.From.Hash == s.To.Hash {
		return ErrSameVersion
	}
	if err := s.allowed(ctx); err != nil {
		return err
	}
	return s.checkByCandidate(ctx)
}

// noTrial returns an error if an upgrade is on trial.
func (m Machine) noTrial(dataDir string) error {
	t, err := bootguard.ReadTrial(m.path(dataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, decided, err := bootguard.ReadVerdict(m.path(dataDir), t); err == nil && decided {
		return fmt.Errorf("%w, and its result is being carried out; wait, and start kedge again if \"kedge upgrade status\" still shows it", ErrOnTrial)
	}
	return fmt.Errorf("%w; \"kedge upgrade status\" shows it, and \"kedge upgrade rollback\" ends it", ErrOnTrial)
}

// unpackInto makes the new launcher unpack its program where the start of the node will look for it: the node is then
// away for less time.
func (s *Staged) unpackInto() []string {
	return []string{"KEDGE_UNPACK_INTO=" + s.machine.path(filepath.Join(s.in.DataDir, "program"))}
}

// Discard removes the copy of the new executable.
func (s *Staged) Discard() error {
	defer s.release()
	path := s.machine.path(s.candidate())
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) { // on a read-only file system Remove has another error
		return nil
	}
	return os.Remove(path)
}

// release lets other commands change the installation.
func (s *Staged) release() {
	if s.lock != nil {
		_ = s.lock.Close() // of a directory that was only locked
		s.lock = nil
	}
}

// program returns the executable that the service starts: that of the installation, or that of the running kedge.
func (s *Staged) program(ctx context.Context) (string, error) {
	path, err := s.machine.Program(s.in.DataDir)
	if !errors.Is(err, ErrNoJournal) {
		return path, err
	}
	r, err := control.GetReport(ctx, s.in.RunDir)
	if err != nil {
		return "", errorkind.Permanent(fmt.Errorf("kedge is not installed with %s by \"kedge install\", and does not run with %s: start it, so that its executable can be found", s.in.DataDir, s.in.RunDir))
	}
	return LauncherOf(r.PID, s.in.DataDir)
}

// LauncherOf returns the executable by which a running kedge was started, which an upgrade replaces.
func LauncherOf(pid int, dataDir string) (string, error) {
	values, err := environment(pid)
	if err != nil {
		return "", err
	}
	return launcherIn(values, dataDir)
}

// environment returns the variables with which a process was started.
func environment(pid int) (map[string]string, error) {
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return nil, err
	}
	return variables(string(environ)), nil
}

// variables returns the variables of an environment as the kernel has it.
func variables(environ string) map[string]string {
	values := map[string]string{}
	for v := range strings.SplitSeq(environ, "\x00") {
		name, value, _ := strings.Cut(v, "=")
		values[name] = value
	}
	return values
}

// launcherIn is [LauncherOf] with the environment of the running kedge.
func launcherIn(values map[string]string, dataDir string) (string, error) {
	path := values["KEDGE_STARTED_BY"]
	if path == "" {
		path = values["KEDGE_LAUNCHER"]
	}
	if path == "" {
		return "", errorkind.Permanent(errors.New("the executable of the running kedge cannot be found: it was started without its launcher"))
	}
	// A launcher of before KEDGE_STARTED_BY has chosen this executable. What would be replaced is a file of the upgrade.
	if dir := filepath.Dir(path); dir == bootguard.Path(dataDir) || dir == filepath.Join(dataDir, "previous") {
		return "", errorkind.Permanent(fmt.Errorf("kedge still runs from %s, since an upgrade; stop kedge, start it again, and run this command again", path))
	}
	return path, nil
}

// Architecture returns the architecture of an executable of kedge, as Go names it. Another program is an error: it must not be
// executed.
func Architecture(path string) (string, error) { return architectureAt(path, 0) }

// architectureAt is [Architecture] of an executable at an offset of a file.
func architectureAt(path string, at int64) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", errorkind.Permanent(err)
	}
	defer file.Close()
	f, err := elf.NewFile(io.NewSectionReader(file, at, 1<<62))
	if err != nil {
		return "", errorkind.Permanent(fmt.Errorf("%s is not an executable of Linux: %w; give an executable of kedge", path, err))
	}
	defer f.Close()
	if info, err := buildinfo.Read(io.NewSectionReader(file, at, 1<<62)); err != nil || info.Main.Path != "kedge" {
		return "", errorkind.Permanent(fmt.Errorf("%s is not an executable of kedge; give one", path))
	}
	for name, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "riscv64": elf.EM_RISCV, "arm": elf.EM_ARM} {
		if f.Machine == machine {
			return name, nil
		}
	}
	return strings.TrimPrefix(f.Machine.String(), "EM_"), nil
}

// checkMachineCode returns an error if the new file is no executable of kedge for this machine's architecture.
func checkMachineCode(in Upgrade) error {
	arch, err := architectureAt(in.File, in.FileAt)
	if err == nil && arch != runtime.GOARCH {
		err = errorkind.Permanent(fmt.Errorf("%s is for another architecture (%s), and this machine is %s; give the executable for %s", in.File, arch, runtime.GOARCH, runtime.GOARCH))
	}
	return err
}

// copyCandidate copies the new executable into the data directory, where it stays when the user's file goes.
func (s *Staged) copyCandidate() error {
	candidate := s.candidate()
	dir := s.machine.path(filepath.Dir(candidate))
	if err := atomicfile.MkdirAll(dir, 0o700); err != nil {
		return explain(step{path: candidate}, err)
	}
	size := s.in.FileSize
	if size == 0 {
		st, err := os.Stat(s.in.File)
		if err != nil {
			return err
		}
		size = st.Size()
	}
	// The executable three times: here, unpacked, and as the one of before. What is unpacked is four times as large.
	need := 6 * uint64(size)
	var free unix.Statfs_t
	if err := unix.Statfs(dir, &free); err != nil {
		return err
	}
	if have := free.Bavail * uint64(free.Bsize); have < need {
		return fmt.Errorf("the file system of %s has %d MiB free, and the upgrade needs %d MiB there; free some space and run the command again", s.in.DataDir, have>>20, need>>20)
	}
	if err := copyPart(s.in.File, s.in.FileAt, s.in.FileSize, "", s.machine.path(candidate), 0o755); err != nil {
		return explain(step{path: candidate}, err)
	}
	return nil
}

// describeLimit is the time limit for an executable to print its version. The first time it unpacks its program.
const describeLimit = 5 * time.Minute

// describe asks an executable for its versions.
func (m Machine) describe(ctx context.Context, path string, env []string) (b Build, err error) {
	out, err := runExecutable(ctx, describeLimit, m.path(path), env, "version")
	if err != nil {
		return b, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	if b, err = parseVersion(out); err != nil {
		return b, errorkind.Permanent(fmt.Errorf("%s is not an executable of kedge: %w", path, err))
	}
	b.Hash, err = hashFile(m.path(path))
	return b, err
}

// runExecutable runs an executable of kedge and returns its output. What it says of an error is in the error.
func runExecutable(ctx context.Context, limit time.Duration, path string, env []string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %s", limit))
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = time.Second
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if err == nil {
		return out.String(), nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if text := strings.TrimSpace(strings.TrimPrefix(errOut.String(), "kedge: ")); text != "" {
		err = fmt.Errorf("%w: %s", err, text)
	}
	return out.String(), err
}

// parseVersion reads the output of "kedge version". Versions from before "kedge upgrade" do not print the format of the
// data directory, which was 1.
func parseVersion(text string) (Build, error) {
	b := Build{DataFormat: 1}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		switch {
		case len(fields) == 3 && fields[0] == "kedge":
			b.Version, b.Commit = fields[1], strings.Trim(fields[2], "()")
		case len(fields) == 2 && fields[0] == "Kubernetes":
			b.Kubernetes = fields[1]
		case len(fields) == 3 && fields[0] == "data" && fields[1] == "format":
			n, err := strconv.Atoi(fields[2])
			if err != nil {
				return b, fmt.Errorf("its version has the line %q", strings.TrimSpace(line))
			}
			b.DataFormat, b.Watches = n, true
		case len(fields) == 2 && strings.HasPrefix(fields[0], "go"):
			b.Platform = fields[1]
		}
	}
	if b.Version == "" || b.Kubernetes == "" {
		return b, errors.New("\"version\" prints no versions of kedge and Kubernetes")
	}
	return b, nil
}

// allowed returns an error if the step from one version to the other is one that Kubernetes or the data do not support.
func (s *Staged) allowed(ctx context.Context) error {
	var cluster clusterVersions
	if r, err := control.GetReport(ctx, s.in.RunDir); err == nil {
		api := nodeAPI{DataDir: s.in.DataDir, Kubeconfig: s.in.Kubeconfig}
		if cluster.server, cluster.kubelets, err = api.Versions(ctx); err != nil {
			s.Notes = append(s.Notes, fmt.Sprintf("the versions of the other nodes are not known: %v", err))
		}
		delete(cluster.kubelets, r.Node)
	}
	return checkStep(s.From, s.To, s.in, cluster)
}

// clusterVersions are the versions of the other machines, as far as they are known.
type clusterVersions struct {
	server   string // of the API that answers
	kubelets map[string]string
}

// maxKubeletAge is by how many minor versions a kubelet may be older than the API server
// (https://kubernetes.io/releases/version-skew-policy/).
const maxKubeletAge = 3

// checkStep returns an error if Kubernetes' version skew policy or the format of the data forbid a step.
func checkStep(from, to Build, in Upgrade, cluster clusterVersions) error {
	refuse := func(format string, args ...any) error {
		return errorkind.Permanent(fmt.Errorf(format, args...))
	}
	before, err := minorOf(from.Kubernetes)
	if err != nil {
		return err
	}
	after, err := minorOf(to.Kubernetes)
	if err != nil {
		return err
	}
	switch {
	case to.DataFormat < from.DataFormat:
		return refuse("kedge %s cannot read the data of kedge %s; restore a backup of the data from before the upgrade with it", to.Version, from.Version)
	case after < before && !in.Rollback:
		return refuse("kedge %s has Kubernetes %s, older than the present %s; Kubernetes does not support that step", to.Version, to.Kubernetes, from.Kubernetes)
	case after < before-1:
		return refuse("kedge %s has Kubernetes %s, more than one minor version older than the present %s", to.Version, to.Kubernetes, from.Kubernetes)
	case in.Role == "server" && after > before+1:
		return refuse("kedge %s has Kubernetes %s, and the present one is %s: Kubernetes does not support to skip minor versions; upgrade to a kedge with Kubernetes 1.%d first", to.Version, to.Kubernetes, from.Kubernetes, before+1)
	}
	if in.Role == "agent" && cluster.server != "" {
		server, err := minorOf(cluster.server)
		if err != nil {
			return err
		}
		if after > server {
			return refuse("kedge %s has Kubernetes %s, newer than the servers' %s; upgrade the servers first", to.Version, to.Kubernetes, cluster.server)
		}
	}
	for name, version := range cluster.kubelets {
		minor, err := minorOf(version)
		if err != nil {
			return err
		}
		if in.Role == "server" && minor < after-maxKubeletAge {
			return refuse("node %s has Kubernetes %s, more than %d minor versions older than that of kedge %s; upgrade the node first", name, version, maxKubeletAge, to.Version)
		}
	}
	return nil
}

// minorOf returns the minor version in a version of Kubernetes, such as 37 in v1.37.1.
func minorOf(version string) (int, error) {
	parts := strings.SplitN(version, ".", 3)
	if len(parts) == 3 && parts[0] == "v1" {
		if n, err := strconv.Atoi(parts[1]); err == nil {
			return n, nil
		}
	}
	return 0, errorkind.Permanent(fmt.Errorf("%q is not a version of Kubernetes", version))
}

// checkByCandidate lets the new executable check the machine and the configuration.
func (s *Staged) checkByCandidate(ctx context.Context) error {
	args := []string{"check", "--data-dir=" + s.in.DataDir, "--run-dir=" + s.in.RunDir}
	if _, err := os.Stat(s.machine.path(s.in.Config)); err == nil { // a file that is named must exist
		args = append(args, "--config="+s.in.Config)
	}
	out, err := runExecutable(ctx, describeLimit, s.machine.path(s.candidate()), s.unpackInto(), args...)
	if err == nil {
		return nil
	}
	var failed []string
	for line := range strings.Lines(out) {
		if text, ok := strings.CutPrefix(line, "error"); ok {
			failed = append(failed, strings.TrimSpace(text))
		}
	}
	if len(failed) > 0 {
		err = errors.New(strings.Join(failed, "\n"))
	}
	return errorkind.Permanent(fmt.Errorf("kedge %s would not start on this machine, which is unchanged: %w", s.To.Version, err))
}

// Begin makes the new version the one that the next start of the node tries. From then on the upgrade goes on without this
// process. A server's datastore is saved before; if that fails, nothing has changed.
func (s *Staged) Begin(ctx context.Context) error {
	defer s.release()
	if err := s.saveSnapshot(ctx); err != nil {
		return err
	}
	if err := s.begin(ctx); err != nil {
		return errors.Join(err, s.discardSnapshot())
	}
	s.pruneSnapshots()
	return nil
}

func (s *Staged) begin(ctx context.Context) error {
	m := s.machine
	if r, err := control.GetReport(ctx, s.in.RunDir); err == nil && s.in.HasNode {
		pods, err := nodeAPI{DataDir: s.in.DataDir, Kubeconfig: s.in.Kubeconfig}.Pods(ctx, r.Node)
		if err != nil {
			return fmt.Errorf("read which containers must go on running: %w", err)
		}
		s.details.Containers = steady(pods, time.Now())
	}
	base, watcher := s.details.Program, ""
	if !s.From.Watches {
		watcher = s.candidate()
		base = filepath.Join(s.in.DataDir, "previous", serviceName)
		if err := m.keepPrevious(m.path(s.details.Program), m.path(base)); err != nil {
			return explain(step{path: base}, err)
		}
		s.details.GuardIsNew = true
	}
	details, err := json.Marshal(s.details)
	if err != nil {
		return err
	}
	trial := bootguard.Trial{
		ID: s.id, Candidate: s.candidate(), Base: base, Watcher: watcher,
		MaxStarts: maxStarts, Details: details,
	}
	if s.From.DataFormat != s.To.DataFormat {
		trial.Save = savedNames
	}
	if err := m.at("begin the trial"); err != nil {
		return err
	}
	if err := bootguard.Begin(m.path(s.in.DataDir), trial); err != nil {
		return explain(step{path: bootguard.Path(s.in.DataDir, "trial.json")}, err)
	}
	if s.details.GuardIsNew {
		if err := copyTo(m.path(trial.Candidate), m.path(s.details.Program), 0o755); err != nil {
			return errors.Join(explain(step{path: s.details.Program}, err), bootguard.End(m.path(s.in.DataDir)))
		}
	}
	return nil
}

// RoleOf returns the role of the node of a data directory: server or agent.
func (m Machine) RoleOf(dataDir string) (string, error) {
	j, err := m.readJournal(dataDir)
	if err == nil {
		return j.Role, nil
	}
	if !errors.Is(err, ErrNoJournal) {
		return "", err
	}
	for _, role := range []string{"server", "agent"} { // a server has both folders
		if _, err := os.Stat(m.path(filepath.Join(dataDir, role))); err == nil {
			return role, nil
		}
	}
	return "", errorkind.Permanent(fmt.Errorf("%s has no node; give the data directory of another with --data-dir, or install kedge with \"kedge install\"", dataDir))
}

// Program returns the executable of an installation. The error wraps [ErrNoJournal] if there is none.
func (m Machine) Program(dataDir string) (string, error) {
	j, err := m.readJournal(dataDir)
	if err != nil {
		return "", err
	}
	if e := j.program(); e != nil {
		return e.Path, nil
	}
	return "", errorkind.Permanent(errors.New("the journal of the installation names no executable; run \"kedge install\" again"))
}

// Installed reports whether an executable is the one that the service of a data directory starts. It is not if there is no
// installation.
func (m Machine) Installed(dataDir, path string) bool {
	j, err := m.readJournal(dataDir)
	if err != nil {
		return false
	}
	sum, err := hashFile(m.path(path))
	if err != nil {
		return false
	}
	return j.program().wrote(sum)
}

// readTrial returns the trial of a data directory with its details.
func (m Machine) readTrial(dataDir string) (t bootguard.Trial, d trialDetails, err error) {
	t, err = bootguard.ReadTrial(m.path(dataDir))
	if err != nil {
		return t, d, err
	}
	if err := json.Unmarshal(t.Details, &d); err != nil {
		return t, d, fmt.Errorf("read the upgrade in %s: %w; remove it to give this upgrade up", bootguard.Path(dataDir, "trial.json"), err)
	}
	return t, d, nil
}

// DataFormat is the format of the data directory that this kedge writes.
const DataFormat = datadir.Format
