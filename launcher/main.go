package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"kedge/internal/datadir"
	"kedge/launcher/packedprogram"
	"kedge/network/cniclient"
	"kedge/throwaway/machine/supervisor"
)

func main() { os.Exit(run(os.Args, os.Environ())) }

// run executes the large program in place of this process, or returns an exit code.
func run(args, env []string) int {
	if filepath.Base(args[0]) == "kedge-cni" {
		return cniclient.Main()
	}
	if code, was := supervisor.Main(args); was {
		return code
	}
	if err := launch(args, env); err != nil {
		fmt.Fprintln(os.Stderr, "kedge:", err)
		return 1
	}
	return 0
}

func launch(args, env []string) error {
	m, err := packedprogram.Read(payloadFS, payloadDir)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	env, by := takeVariables(env)
	if by[detachVariable] != "" {
		return detach(self, args, env)
	}
	in := places(args, env, os.Geteuid())
	node := len(in) == 1
	if into := by[unpackVariable]; into != "" {
		in, node = []place{{dir: into, create: true}}, false
	} else if node && by[guardedVariable] == "" {
		if err := guard(filepath.Dir(in[0].dir), self, args, env); err != nil {
			return err
		}
	}
	program, err := find(m, in)
	switch {
	case err != nil && len(in) == 1:
		return datadir.Unwritable(filepath.Dir(in[0].dir), err)
	case err != nil:
		return err
	}
	if node {
		// A server writes the file again when its start is complete, so that a program that ends within seconds
		// is checked before it runs again.
		_ = os.Remove(filepath.Join(filepath.Dir(program.Name()), packedprogram.CheckedName))
	}
	// The program links the CNI plugin to the launcher.
	env = append(env, "KEDGE_LAUNCHER="+self)
	if by := by[guardedVariable]; filepath.IsAbs(by) { // earlier launchers give no path
		env = append(env, startedByVariable+"="+by)
	}
	// The checked file is executed, even if its name refers to another file by now.
	if err := syscall.Exec(fmt.Sprintf("/proc/self/fd/%d", program.Fd()), args, env); err != nil {
		return fmt.Errorf("start %s: %w", program.Name(), err)
	}
	return nil
}

// place is a folder in which programs are kept.
type place struct {
	dir    string
	create bool // unpack here if the program is in no place
	cache  bool // only the launcher removes older programs here and records checks
}

// olderVersions is the number of programs that stay in a cache beside the one that was just unpacked: earlier versions
// may still be in use.
const olderVersions = 2

const defaultDataDir = "/var/lib/kedge"

// rootCache is the cache for root without a home directory.
const rootCache = "/var/cache/kedge/program"

// places returns the folders that may contain the program, in order of preference. A server uses its data
// directory, the only directory that it may write to. Other commands use an existing program there, or else the
// user's cache: they must not create a data directory.
func places(args, env []string, uid int) []place {
	vars := map[string]string{}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		vars[name] = value
	}
	dataDir := dataDirOf(args, vars)
	server := len(args) > 1 && (args[1] == "server" || args[1] == "agent") && !onlyHelp(args)
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
	if uid == 0 { // other users may have created files in /tmp
		return append(out, place{dir: rootCache, create: true, cache: true})
	}
	return append(out, place{dir: filepath.Join(os.TempDir(), fmt.Sprintf("kedge-%d", uid), "program"), create: true, cache: true})
}

// onlyHelp reports whether a command line only requests help or completion.
func onlyHelp(args []string) bool {
	return slices.ContainsFunc(args, func(a string) bool {
		return a == "--help" || a == "-h" || a == "--generate-bash-completion"
	})
}

// dataDirOf finds --data-dir like the large program: in the flag, the environment, and the configuration file.
// The large program reports a file that cannot be read.
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
		data, err := configuration(f)
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

// maxConfiguration is the maximum size of a configuration file in bytes, as in the large program.
const maxConfiguration = 1 << 20

// configuration reads a regular file; a device or a pipe could be endless.
func configuration(path string) ([]byte, error) {
	// Without O_NONBLOCK, opening a pipe would wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, fs.ErrInvalid)
	}
	return io.ReadAll(io.LimitReader(f, maxConfiguration))
}

// shortNames are the short names of the flags that are read here. In kubectl's arguments they have another
// meaning.
var shortNames = map[string]string{"data-dir": "d", "config": "c"}

// flagValue returns the value of the last --name=VALUE or --name VALUE.
func flagValue(args []string, name string) (value string) {
	names := []string{name}
	if len(args) > 1 && slices.Contains([]string{"server", "agent", "check", "doctor", "support-bundle", "killall"}, args[1]) {
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

// find returns the program, open and checked, and unpacks it first if it is in none of the places.
func find(m packedprogram.Manifest, in []place) (*os.File, error) {
	var errs []error
	for _, p := range in {
		f, err := open(p, m)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) { // unpacking reports these errors better
			errs = append(errs, err)
		}
		if p.create {
			break // the program will be unpacked here
		}
	}
	for _, p := range in {
		if !p.create {
			continue
		}
		for _, err := range errs {
			if errors.Is(err, errDamaged) {
				fmt.Fprintf(os.Stderr, "kedge: %v; it is unpacked again. If this happens repeatedly, the disk is failing\n", err)
			}
		}
		f, err := unpack(m, p)
		if err == nil {
			if p.cache {
				_ = packedprogram.Prune(p.dir, m.ID(), olderVersions) // a failure only costs disk space
			}
			return f, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}

// unpack writes the program into a place and opens it. Several launchers may do so at the same time.
func unpack(m packedprogram.Manifest, p place) (*os.File, error) {
	dir := p.dir
	// An existing directory is checked before files are created in it.
	for _, prepare := range []func() error{
		func() error { return trustedDir(nearestExisting(dir), p.cache) },
		func() error { return os.MkdirAll(dir, 0o755) },
		func() error { return trustedDir(dir, p.cache) },
	} {
		if err := prepare(); err != nil {
			return nil, fmt.Errorf("unpack the program: %w", err)
		}
	}
	tmp, release, err := tempDir(dir)
	if err != nil {
		return nil, fmt.Errorf("unpack the program: %w", err)
	}
	defer release()
	defer os.RemoveAll(tmp)
	f, err := os.OpenFile(filepath.Join(tmp, packedprogram.ProgramName), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return nil, fmt.Errorf("unpack the program: %w", err)
	}
	err = packedprogram.Unpack(payloadFS, payloadDir, m, f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("unpack the program into %s: %w", dir, err)
	}
	if err := os.WriteFile(filepath.Join(tmp, packedprogram.BootName), []byte(packedprogram.BootID()), 0o644); err != nil {
		return nil, fmt.Errorf("unpack the program: %w", err)
	}
	// Unpack has verified the checksums of the pieces.
	if err := os.WriteFile(filepath.Join(tmp, packedprogram.CheckedName), []byte(packedprogram.BootID()), 0o644); err != nil {
		return nil, fmt.Errorf("unpack the program: %w", err)
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return nil, fmt.Errorf("unpack the program: %w", err)
	}
	final := filepath.Join(dir, m.ID())
	if err := os.Rename(tmp, final); err == nil {
		return open(p, m)
	}
	if f, err := open(p, m); err == nil {
		return f, nil // another launcher was faster
	}
	// The existing folder is incomplete after a power failure, or damaged.
	if err := os.RemoveAll(final); err != nil {
		return nil, fmt.Errorf("unpack the program: %w", err)
	}
	if err := os.Rename(tmp, final); err != nil {
		return nil, fmt.Errorf("unpack the program: %w", err)
	}
	return open(p, m)
}
