// Package parameters restores the kernel's parameters that a node has set, when kedge is removed from a machine.
//
// Kedge sets parameters at its start: those of forwarding, limits of inotify, those that the kubelet sets, and the
// controllers of the topmost cgroup. [Remember] writes their values into the run directory before, once after each boot, and [Restore] sets them again. A parameter that
// has another value than kedge's by then, that a file of sysctl.d sets too, or that something else on the machine may need
// stays as it is.
//
// The package sets nothing for a node: packages agent and network do, and the kubelet. Packages appliance and assembly may
// import it.
package parameters

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
)

// FileName is the name of the file in the run directory.
const FileName = "parameters.json"

// maxFile is the maximum size of the file, and of a file of sysctl.d that is read.
const maxFile = 1 << 20

// set has the parameters that a node sets, and their values. Forwarding comes first: the kernel changes other parameters of
// the network with it.
var set = []struct{ pattern, value string }{
	{"net/ipv4/ip_forward", "1"},
	{"net/ipv6/conf/all/forwarding", "1"},
	{"net/ipv6/conf/*/accept_ra", "2"},
	{"fs/inotify/max_user_instances", "8192"},
	{"fs/inotify/max_user_watches", "524288"},
	{"vm/overcommit_memory", "1"},
	{"vm/panic_on_oom", "0"},
	{"kernel/panic", "10"},
	{"kernel/panic_on_oops", "1"},
	{"kernel/keys/root_maxkeys", "1000000"},
	{"kernel/keys/root_maxbytes", "25000000"},
}

// content is the content of the file.
type content struct {
	Boot   string            `json:"boot"`   // of which the values are
	Before map[string]string `json:"before"` // values by names such as "net/ipv4/ip_forward"
	// Controllers has the controllers that the topmost cgroup had enabled; nil for cgroups of version 1.
	Controllers *string `json:"controllers,omitempty"`
	Sum         string  `json:"sum"` // of the rest
}

func (c content) sum() string {
	c.Sum = ""
	data, _ := json.Marshal(c) // maps are sorted; strings have no errors
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// values returns the values of the parameters of a machine, with their names.
func values(root string) (map[string]string, error) {
	all := map[string]string{}
	base := filepath.Join(root, "proc/sys")
	for _, s := range set {
		paths, err := filepath.Glob(filepath.Join(base, s.pattern))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			value, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				continue // an interface that is gone
			}
			if err != nil {
				return nil, err
			}
			all[strings.TrimPrefix(path, base+"/")] = strings.TrimSpace(string(value))
		}
	}
	return all, nil
}

// read returns the values that were remembered since the machine was booted; none if the file is missing, damaged or of
// an earlier boot.
func read(root, runDir string) (c content, err error) {
	boot, err := os.ReadFile(filepath.Join(root, "proc/sys/kernel/random/boot_id"))
	if err != nil {
		return c, err
	}
	fresh := content{Boot: strings.TrimSpace(string(boot)), Before: map[string]string{}}
	data, err := atomicfile.ReadSmall(filepath.Join(root, runDir, FileName), maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return c, err
	}
	if json.Unmarshal(data, &c) != nil || c.Boot != fresh.Boot || c.Before == nil || c.Sum != c.sum() {
		return fresh, nil
	}
	return c, nil
}

// Remember writes the values of the parameters into the run directory, except for those that are in it since an earlier
// start. It is called before anything sets them. root is "/".
func Remember(root, runDir string) error {
	c, err := read(root, runDir)
	if err != nil {
		return fmt.Errorf("remember kernel parameters: %w", err)
	}
	now, err := values(root)
	if err != nil {
		return fmt.Errorf("remember kernel parameters: %w", err)
	}
	for name, value := range now {
		if _, ok := c.Before[name]; !ok {
			c.Before[name] = value
		}
	}
	if c.Controllers == nil {
		enabled, err := os.ReadFile(filepath.Join(root, enabledControllers))
		if err == nil {
			text := strings.TrimSpace(string(enabled))
			c.Controllers = &text
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remember the controllers of cgroups: %w", err)
		}
	}
	c.Sum = c.sum()
	data, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(filepath.Join(root, runDir, FileName), append(data, '\n'), 0o600)
	return err
}

// Restore sets the parameters to the values that they had before the node's first start since the boot. It is called
// after the node's kernel objects are removed. notes say which ones stay, and why.
func Restore(root, runDir string) (notes []string, err error) {
	c, err := read(root, runDir)
	if err != nil || len(c.Before) == 0 {
		return nil, err
	}
	now, err := values(root)
	if err != nil {
		return nil, err
	}
	others, err := otherNode(root)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, s := range set {
		for name, value := range now {
			before, known := c.Before[name]
			if ok, _ := filepath.Match(s.pattern, name); !ok || !known || value != s.value || before == value {
				continue
			}
			why, err := others, error(nil)
			if why == "" {
				why, err = needed(root, name)
			}
			switch {
			case err != nil:
				errs = append(errs, err)
			case why != "":
				notes = append(notes, fmt.Sprintf("the kernel parameter %s stays %s, and was %s: %s", strings.ReplaceAll(name, "/", "."), value, before, why))
			default:
				err := os.WriteFile(filepath.Join(root, "proc/sys", name), []byte(before), 0)
				if !errors.Is(err, fs.ErrNotExist) { // an interface that is gone
					errs = append(errs, err)
				}
			}
		}
	}
	slices.Sort(notes)
	if others == "" {
		errs = append(errs, restoreControllers(root, c.Controllers))
	}
	return notes, errors.Join(errs...)
}

// enabledControllers is the file with the controllers that the topmost cgroup has enabled for those below it.
const enabledControllers = "sys/fs/cgroup/cgroup.subtree_control"

// ofSystemd are the controllers that systemd enables and disables where it needs them.
var ofSystemd = []string{"cpu", "cpuset", "io", "memory", "pids"}

// restoreControllers disables controllers that were not enabled before, and that systemd does not know. Without systemd they
// stay: limits of somebody else's cgroup would be gone with the controller.
func restoreControllers(root string, before *string) error {
	if _, err := os.Stat(filepath.Join(root, "run/systemd/system")); err != nil || before == nil {
		return nil
	}
	path := filepath.Join(root, enabledControllers)
	now, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var errs []error
	for c := range strings.FieldsSeq(string(now)) {
		if slices.Contains(ofSystemd, c) || slices.Contains(strings.Fields(*before), c) {
			continue
		}
		if err := os.WriteFile(path, []byte("-"+c), 0o644); !errors.Is(err, unix.EBUSY) { // a cgroup below enables it too
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// otherNode says that another kedge's pods are on the machine; empty if not.
func otherNode(root string) (string, error) {
	for _, pattern := range []string{"kedge-*", "*/kedge-*", "kedge_*.slice"} {
		found, err := filepath.Glob(filepath.Join(root, "sys/fs/cgroup", pattern))
		if err != nil {
			return "", err
		}
		if len(found) > 0 {
			return "another kedge (" + filepath.Base(found[0]) + ") is on this machine", nil
		}
	}
	return "", nil
}

// needed says what else on the machine needs a parameter; empty if nothing is known.
func needed(root, name string) (string, error) {
	if strings.HasSuffix(name, "/ip_forward") || strings.HasSuffix(name, "/forwarding") {
		links, err := os.ReadDir(filepath.Join(root, "sys/class/net"))
		if err != nil {
			return "", err
		}
		for _, l := range links {
			_, err := os.Stat(filepath.Join(root, "sys/class/net", l.Name(), "device"))
			if errors.Is(err, fs.ErrNotExist) && l.Name() != "lo" && l.Type() != 0 { // a regular file is none: bonding_masters
				return "the interface " + l.Name() + " of another program may need it", nil
			}
		}
	}
	return configured(root, name)
}

// configured says that a file of sysctl.d sets a parameter; empty if none does.
func configured(root, name string) (string, error) {
	// "net.ipv4.ip_forward = 1", with slashes too, and with "-" in front if errors are to be ignored.
	line, err := regexp.Compile(`(?m)^\s*-?\s*` + strings.ReplaceAll(regexp.QuoteMeta(name), "/", "[./]") + `\s*=`)
	if err != nil {
		return "", err
	}
	for _, pattern := range []string{"etc/sysctl.conf", "etc/sysctl.d/*.conf", "run/sysctl.d/*.conf", "usr/local/lib/sysctl.d/*.conf", "usr/lib/sysctl.d/*.conf"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			return "", err
		}
		for _, f := range files {
			if st, err := os.Stat(f); err != nil || !st.Mode().IsRegular() {
				continue // a link to /dev/null, which switches a file off, or to nothing
			}
			data, err := atomicfile.ReadSmall(f, maxFile)
			if err != nil {
				return "", err
			}
			if line.Match(data) {
				return strings.TrimPrefix(f, strings.TrimSuffix(root, "/")) + " sets it", nil
			}
		}
	}
	return "", nil
}
