package machine

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
	"kedge/internal/cgroup"
	"kedge/throwaway/lan"
	"kedge/throwaway/machine/supervisor"
)

// Config describes a site to be made.
type Config struct {
	// Dir is the folder of the site. It is made, and must not exist.
	Dir string
	// Program is the executable that the machines run. Supervisor is the executable that
	// becomes a supervisor when it is called by the names of package supervisor.
	Program, Supervisor string
	// Tethered machines end when this process does, however it ends.
	Tethered bool
	// Host has the addresses of this machine on the switch, by which it and the machines
	// reach each other; none for a switch without this machine.
	Host []netip.Prefix
	// Ports are published on this machine.
	Ports []Port
}

// Port is a port published on this machine: connections to Listen are passed to port To of the
// first machine that answers.
type Port struct {
	Listen netip.AddrPort `json:"listen"`
	To     int            `json:"to"`
}

// Validate returns all mistakes in the configuration.
func (c Config) Validate() error {
	var errs []error
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("the folder of a site must be an absolute path, not %q", c.Dir))
	}
	for _, path := range []string{c.Program, c.Supervisor} {
		if st, err := os.Stat(path); err != nil {
			errs = append(errs, err)
		} else if !st.Mode().IsRegular() {
			errs = append(errs, fmt.Errorf("%s is not an executable", path))
		}
	}
	if len(c.Ports) > 0 && len(c.Host) == 0 {
		errs = append(errs, errors.New("ports can be published only if this machine has an address on the switch"))
	}
	return errors.Join(errs...)
}

// record is the content of site.json: enough to start the site again, and to remove it.
type record struct {
	ID         string         `json:"id"` // in the names of kernel objects
	Program    string         `json:"program"`
	Supervisor string         `json:"keeper"`
	Tethered   bool           `json:"tethered"`
	Host       []netip.Prefix `json:"host,omitempty"`
	Ports      []Port         `json:"ports,omitempty"`
	Machines   []machine      `json:"machines,omitempty"`
}

// machine is the record of a machine.
type machine struct {
	Name    string         `json:"name"`
	Addrs   []netip.Prefix `json:"addrs"`
	Gateway []netip.Addr   `json:"gateway,omitempty"`
}

const recordName = "site.json"

func (r *record) cgroup() string { return "/kedge-machines-" + r.ID }
func (r *record) link() string   { return "kdm-" + r.ID }

// Site is a switch and the machines joined to it.
type Site struct {
	dir string

	mu       sync.Mutex // guards the fields below
	record   record
	lan      *lan.LAN // nil while there is no switch
	tether   *tether  // to the switch's supervisor; nil unless this process has started it
	machines map[string]*Machine
}

// Create makes a site without machines. Close leaves it to other processes unless it is
// tethered, and Remove removes it.
func Create(c Config) (*Site, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("make a site: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(c.Dir), 0o755); err != nil {
		return nil, fmt.Errorf("make a site: %w", err)
	}
	if err := os.Mkdir(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make a site: %w", err)
	}
	id := make([]byte, 4)
	rand.Read(id)
	s := &Site{dir: c.Dir, machines: map[string]*Machine{}, record: record{
		ID: hex.EncodeToString(id), Program: c.Program, Supervisor: c.Supervisor, Tethered: c.Tethered, Host: c.Host, Ports: c.Ports,
	}}
	if err := s.save(); err != nil {
		return nil, errors.Join(fmt.Errorf("make a site: %w", err), os.RemoveAll(c.Dir))
	}
	if err := s.Up(); err != nil {
		return nil, errors.Join(fmt.Errorf("make a site: %w", err), s.Remove())
	}
	return s, nil
}

// Open opens a site that another process has made, perhaps before a reboot of this host.
func Open(dir string) (*Site, error) {
	r, err := load(dir)
	if err != nil {
		return nil, err
	}
	s := &Site{dir: dir, record: r, machines: map[string]*Machine{}}
	if pids, err := cgroup.Processes(s.switchGroup()); err == nil && len(pids) > 0 {
		if s.lan, err = lan.Open(fmt.Sprintf("/proc/%d/fd/%d", pids[0], supervisor.NetFile)); err != nil {
			return nil, err
		}
	}
	for _, m := range r.Machines {
		s.machines[m.Name] = &Machine{site: s, record: m}
	}
	return s, nil
}

func load(dir string) (record, error) {
	var r record
	data, err := os.ReadFile(filepath.Join(dir, recordName))
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err == nil && !idPattern.MatchString(r.ID) {
		err = fmt.Errorf("invalid id %q", r.ID)
	}
	if err != nil {
		return r, fmt.Errorf("read the record of the site in %s: %w", dir, err)
	}
	return r, nil
}

var idPattern = regexp.MustCompile(`^[0-9a-f]{8}$`)

// save writes the record. The caller holds mu, or the site is not shared yet.
func (s *Site) save() error {
	data, err := json.MarshalIndent(s.record, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(s.dir, recordName), append(data, '\n'), 0o600)
}

func (s *Site) switchGroup() string { return s.record.cgroup() + "/switch" }

// Up makes the switch if there is none, such as after a reboot of the host.
func (s *Site) Up() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lan != nil {
		return nil
	}
	if err := cgroup.Ensure(s.record.cgroup()); err != nil {
		return err
	}
	if s.lan, err = lan.New(); err != nil {
		return err
	}
	if err := s.startSwitch(); err != nil {
		return err
	}
	if len(s.record.Host) > 0 {
		return s.lan.Attach(s.record.link(), s.record.Host...)
	}
	return nil
}

// startSwitch starts the supervisor of the switch. Caller holds mu.
func (s *Site) startSwitch() error {
	if err := cgroup.EnsureGroup(s.switchGroup()); err != nil {
		return err
	}
	groups, err := cgroup.Dirs(s.switchGroup())
	if err != nil {
		return err
	}
	spec := supervisor.Switch{Cgroups: groups, Tethered: s.record.Tethered, Targets: s.targetsFile()}
	files := []*os.File{}
	fd, err := unix.FcntlInt(uintptr(s.lan.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	files = append(files, os.NewFile(uintptr(fd), "switch"))
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, p := range s.record.Ports {
		l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(p.Listen))
		if errors.Is(err, unix.EADDRINUSE) {
			return fmt.Errorf("port %d of this machine is in use; choose another port", p.Listen.Port())
		}
		if err != nil {
			return fmt.Errorf("publish a port: %w", err)
		}
		f, err := l.File()
		l.Close()
		if err != nil {
			return err
		}
		files = append(files, f)
		spec.Ports = append(spec.Ports, p.To)
	}
	s.tether, err = s.spawn(supervisor.SwitchName, spec, nil, 0, files)
	return err
}

func (s *Site) targetsFile() string { return filepath.Join(s.dir, "targets") }

// writeTargets writes the machines' addresses for the switch's supervisor. Caller holds mu.
func (s *Site) writeTargets() error {
	var text strings.Builder
	for _, m := range s.record.Machines {
		for _, p := range m.Addrs {
			fmt.Fprintln(&text, p.Addr())
		}
	}
	return atomicfile.Write(s.targetsFile(), []byte(text.String()), 0o600)
}

// LAN is the site's switch; nil while there is none.
func (s *Site) LAN() *lan.LAN { return s.lan }

// Dir is the folder of the site.
func (s *Site) Dir() string { return s.dir }

// Link is the name of this machine's interface on the switch.
func (s *Site) Link() string { return s.record.link() }

// Cgroup is the path of the site's control group in each hierarchy.
func (s *Site) Cgroup() string { return s.record.cgroup() }

// Machine returns a machine by its name, or nil.
func (s *Site) Machine(name string) *Machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machines[name]
}

// Machines returns all machines in the order in which they were added.
func (s *Site) Machines() []*Machine {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*Machine
	for _, m := range s.record.Machines {
		all = append(all, s.machines[m.Name])
	}
	return all
}

var namePattern = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?$`)

// Add makes a machine with the given addresses on its uplink and default routes
// through the gateways. It is switched off.
func (s *Site) Add(name string, addrs []netip.Prefix, gateways ...netip.Addr) (*Machine, error) {
	if !namePattern.MatchString(name) || name == "switch" {
		return nil, fmt.Errorf("invalid machine name %q; use lower-case letters, digits, dashes and dots", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.machines[name] != nil {
		return nil, fmt.Errorf("machine %s exists already", name)
	}
	r := machine{Name: name, Addrs: addrs, Gateway: gateways}
	s.record.Machines = append(s.record.Machines, r)
	m := &Machine{site: s, record: r}
	err := s.save()
	if err == nil {
		err = s.writeTargets()
	}
	if err == nil {
		err = m.seed()
	}
	if err != nil {
		s.record.Machines = s.record.Machines[:len(s.record.Machines)-1]
		return nil, fmt.Errorf("add machine %s: %w", name, errors.Join(err, s.save()))
	}
	s.machines[name] = m
	return m, nil
}

// Close ends this process's use of the site. Tethered machines end.
func (s *Site) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, m := range s.machines {
		errs = append(errs, m.tether.close())
		m.tether = nil
	}
	errs = append(errs, s.tether.close())
	s.tether = nil
	if s.lan != nil {
		errs = append(errs, s.lan.Disown())
		s.lan = nil
	}
	return errors.Join(errs...)
}

// Remove ends every process of the site and removes all of it.
func (s *Site) Remove() error {
	s.mu.Lock()
	if s.lan != nil {
		_ = s.lan.Close() // the end of the supervisors removes the rest
		s.lan = nil
	}
	s.mu.Unlock()
	err := Remove(s.dir)
	return errors.Join(err, s.Close())
}

// Remove removes the site that is recorded in dir, with processes, links, control groups and
// files, also if it was only partly made or removed. A missing dir is not an error.
func Remove(dir string) error {
	r, err := load(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return removeUnrecorded(dir)
	}
	if err != nil {
		return err
	}
	if err := cgroup.Clear(r.cgroup()); err != nil {
		return fmt.Errorf("end the machines of %s: %w", dir, err)
	}
	if err := lan.Detach(r.link()); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != recordName { // which is removed last
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return removeTree(dir)
}

// removeUnrecorded removes the folder of a site whose record was never complete, or is already
// removed: it holds at most the temporary file of the record.
func removeUnrecorded(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.Contains(e.Name(), recordName) {
			return fmt.Errorf("%s has no record of a site; remove it by hand if it is not needed", dir)
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return os.Remove(dir)
}

// removeTree removes files. It refuses to remove a folder with mounts, which could belong to
// anyone.
func removeTree(dir string) error {
	found, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list the mounts below %s: %w", dir, err)
	}
	if len(found) > 0 {
		return fmt.Errorf("%s is a mount inside a folder to be removed; unmount it", found[0].Mountpoint)
	}
	// The kernel releases the mounts of machines a moment after their processes.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := os.RemoveAll(dir)
		if err == nil || !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// forget removes a machine from the record. Caller holds mu.
func (s *Site) forget(name string) error {
	delete(s.machines, name)
	s.record.Machines = slices.DeleteFunc(s.record.Machines, func(m machine) bool { return m.Name == name })
	return errors.Join(s.save(), s.writeTargets())
}
