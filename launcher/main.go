package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"kedge/internal/datadir"
	"kedge/internal/machines/keeper"
	"kedge/internal/packed"
	"kedge/network/cniclient"
)

func main() { os.Exit(run(os.Args, os.Environ())) }

// run becomes the large program, or returns an exit code.
func run(args, env []string) int {
	if filepath.Base(args[0]) == "kedge-cni" {
		return cniclient.Main()
	}
	if code, was := keeper.Main(args); was {
		return code
	}
	if err := launch(args, env); err != nil {
		fmt.Fprintln(os.Stderr, "kedge:", err)
		return 1
	}
	return 0
}

func launch(args, env []string) error {
	m, err := packed.Read(payloadFS, payloadDir)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	in := places(args, env, os.Geteuid())
	program, err := find(m, in)
	switch {
	case err != nil && len(in) == 1: // a server
		return datadir.Unwritable(filepath.Dir(in[0].dir), err)
	case err != nil:
		return err
	}
	// The program makes the plug-in's link lead to the launcher.
	env = append(env, "KEDGE_LAUNCHER="+self)
	if err := syscall.Exec(program, args, env); err != nil {
		return fmt.Errorf("start %s: %w", program, err)
	}
	return nil
}

// place is a folder in which programs are kept.
type place struct {
	dir    string
	create bool // unpack here when the program is nowhere yet
	cache  bool // nobody else removes older programs from here
}

// others is how many programs stay in a cache beside the one that was just unpacked:
// those of versions that are still in use, or were a moment ago.
const others = 2

const defaultDataDir = "/var/lib/kedge"

// places are where the program may be, in the order of preference. A server keeps
// it in its data directory, which is the only one it may write to. Other commands
// use what is there, and else the user's cache: they must not make a data directory.
func places(args, env []string, uid int) []place {
	vars := map[string]string{}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		vars[name] = value
	}
	dataDir := dataDirOf(args, vars)
	server := len(args) > 1 && (args[1] == "server" || args[1] == "agent") && !asks(args)
	out := []place{{dir: filepath.Join(dataDir, "program"), create: server && uid == 0}}
	if out[0].create {
		return out
	}
	if dataDir != defaultDataDir {
		out = append(out, place{dir: filepath.Join(defaultDataDir, "program")})
	}
	cache := vars["XDG_CACHE_HOME"]
	if cache == "" && vars["HOME"] != "" {
		cache = filepath.Join(vars["HOME"], ".cache")
	}
	if cache != "" {
		out = append(out, place{dir: filepath.Join(cache, "kedge", "program"), create: true, cache: true})
	}
	return append(out, place{dir: filepath.Join(os.TempDir(), fmt.Sprintf("kedge-%d", uid), "program"), create: true, cache: true})
}

// asks reports whether a command line only asks what there is to say.
func asks(args []string) bool {
	return slices.ContainsFunc(args, func(a string) bool {
		return a == "--help" || a == "-h" || a == "--generate-bash-completion"
	})
}

// dataDirOf finds --data-dir as the large program will: the flag, the environment,
// the configuration file. A file that cannot be read is that program's to report.
func dataDirOf(args []string, vars map[string]string) string {
	if v := flagValue(args, "data-dir"); v != "" {
		return v
	}
	if v := vars["KEDGE_DATA_DIR"]; v != "" {
		return v
	}
	file := flagValue(args, "config")
	if file == "" {
		file = vars["KEDGE_CONFIG"]
	}
	if file == "" {
		file = "/etc/kedge/config.yaml"
	}
	dir := defaultDataDir
	more, _ := filepath.Glob(filepath.Join(file+".d", "*.yaml")) // sorted
	for _, f := range append([]string{file}, more...) {
		data, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			if v, ok := strings.CutPrefix(line, "data-dir:"); ok {
				v, _, _ = strings.Cut(v, " #")
				dir = strings.Trim(strings.TrimSpace(v), `"'`)
			}
		}
	}
	return dir
}

// shortNames are those of the flags that are read here; in kubectl's arguments they mean
// something else.
var shortNames = map[string]string{"data-dir": "d", "config": "c"}

// flagValue is the value of the last --name=VALUE or --name VALUE.
func flagValue(args []string, name string) (value string) {
	names := []string{name}
	if len(args) > 1 && slices.Contains([]string{"server", "agent", "check", "killall"}, args[1]) {
		names = append(names, shortNames[name])
	}
	for i, a := range args {
		a, ok := strings.CutPrefix(a, "-")
		if !ok {
			continue
		}
		given, v, with := strings.Cut(strings.TrimPrefix(a, "-"), "=")
		switch {
		case !slices.Contains(names, given):
		case with:
			value = v
		case i+1 < len(args):
			value = args[i+1]
		}
	}
	return value
}

// find returns the path of the program, after unpacking it if it is in none of the
// places.
func find(m packed.Manifest, in []place) (string, error) {
	for _, p := range in {
		name := filepath.Join(p.dir, m.ID(), packed.ProgramName)
		if complete(name, m) {
			return name, nil
		}
		if p.create {
			break // it will be unpacked here; a later place is not better
		}
	}
	var errs []error
	for _, p := range in {
		if !p.create {
			continue
		}
		name, err := unpack(m, p.dir)
		if err == nil {
			if p.cache {
				_ = packed.Prune(p.dir, m.ID(), others) // what cannot be removed takes space, and no more
			}
			return name, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// complete reports whether the file is the program, from the disk or written since
// the machine booted.
func complete(name string, m packed.Manifest) bool {
	st, err := os.Stat(name)
	if err != nil || st.Size() != m.Size || !trusted(st) {
		return false
	}
	dir := filepath.Dir(name)
	if _, err := os.Stat(filepath.Join(dir, packed.SyncedName)); err == nil {
		return true
	}
	boot, err := os.ReadFile(filepath.Join(dir, packed.BootName))
	return err == nil && string(boot) == bootID()
}

// trusted refuses a program that somebody else could have put there.
func trusted(st fs.FileInfo) bool {
	sys, ok := st.Sys().(*syscall.Stat_t)
	return ok && (int(sys.Uid) == os.Geteuid() || sys.Uid == 0) && st.Mode().Perm()&0o022 == 0
}

func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(id)
}

// unpack writes the program into dir and returns its path. Two launchers may do so
// at the same time.
func unpack(m packed.Manifest, dir string) (name string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("unpack the program: %w", err)
	}
	tmp, release, err := tempDir(dir)
	if err != nil {
		return "", fmt.Errorf("unpack the program: %w", err)
	}
	defer release()
	defer os.RemoveAll(tmp)
	f, err := os.OpenFile(filepath.Join(tmp, packed.ProgramName), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return "", fmt.Errorf("unpack the program: %w", err)
	}
	err = packed.Unpack(payloadFS, payloadDir, m, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", fmt.Errorf("unpack the program into %s: %w", dir, err)
	}
	if err := os.WriteFile(filepath.Join(tmp, packed.BootName), []byte(bootID()), 0o644); err != nil {
		return "", fmt.Errorf("unpack the program: %w", err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", fmt.Errorf("unpack the program: %w", err)
	}
	final := filepath.Join(dir, m.ID())
	name = filepath.Join(final, packed.ProgramName)
	if err := os.Rename(tmp, final); err == nil {
		return name, nil
	}
	if complete(name, m) {
		return name, nil // another launcher was faster
	}
	// What is there did not survive a power cut, or is not the program.
	if err := os.RemoveAll(final); err != nil {
		return "", fmt.Errorf("unpack the program: %w", err)
	}
	if err := os.Rename(tmp, final); err != nil {
		return "", fmt.Errorf("unpack the program: %w", err)
	}
	return name, nil
}
