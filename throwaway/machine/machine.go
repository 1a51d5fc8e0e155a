package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/cgroup"
	"kedge/internal/namespaces"
	"kedge/throwaway/lan"
	"kedge/throwaway/machine/supervisor"
)

// Machine is one machine of a site.
type Machine struct {
	site   *Site
	record machine
	host   *lan.Host // nil while the machine is off, or not yet adopted by this process
	tether *tether   // nil unless this process has started its supervisor
}

// searchPath is PATH inside a machine.
const searchPath = "/opt/kedge:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Environment is the environment of programs on a machine.
func Environment() []string {
	return []string{"PATH=" + searchPath, "HOME=/root", "LANG=C.UTF-8"}
}

// Name is the machine's name and host name.
func (m *Machine) Name() string { return m.record.Name }

// Addrs returns the recorded addresses of the uplink.
func (m *Machine) Addrs() []netip.Prefix { return m.record.Addrs }

// Cgroup is the path of the machine's control group in each hierarchy of the host. Inside the
// machine it is the root.
func (m *Machine) Cgroup() string { return m.site.record.cgroup() + "/" + m.record.Name }

func (m *Machine) leaf() string { return m.Cgroup() + "/" + supervisor.Leaf }
func (m *Machine) dir() string  { return filepath.Join(m.site.dir, m.record.Name) }

// Disk is the host's path of a file on the machine's disk. Folders that are mounted while the
// machine runs, above all /run, are not on the disk: see Live.
func (m *Machine) Disk(path string) string { return filepath.Join(m.dir(), "root", path) }

// Live is the host's path of a file as the running machine sees it, also on a file system in
// memory. The path is short enough for sockets.
func (m *Machine) Live(path string) (string, error) {
	pid, err := m.PID()
	if err != nil {
		return "", err
	}
	return filepath.Join(fmt.Sprintf("/proc/%d/root", pid), path), nil
}

// Log is the host's path of kedge's log.
func (m *Machine) Log() string { return m.Disk(supervisor.LogPath) }

// ErrOff is wrapped by errors of operations that need a running machine.
var ErrOff = errors.New("the machine is off")

// PID is the process number of the supervisor, the machine's first process. The supervisor is
// looked up in the machine's control group, so the number cannot be another process's.
func (m *Machine) PID() (int, error) {
	pids, err := cgroup.Processes(m.leaf())
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue // ended meanwhile
		}
		for line := range strings.Lines(string(status)) {
			// The numbers are from our namespace inwards. The first process of its namespace
			// has number 1 there.
			if f := strings.Fields(line); len(f) > 2 && f[0] == "NSpid:" && f[len(f)-1] == "1" {
				return pid, nil
			}
		}
	}
	return 0, fmt.Errorf("%s: %w", m.record.Name, ErrOff)
}

// On reports whether the machine is switched on, whether kedge runs or not.
func (m *Machine) On() bool {
	_, err := m.PID()
	return err == nil
}

// Host is the machine's host on the switch. The machine must be on.
func (m *Machine) Host() (*lan.Host, error) {
	m.site.mu.Lock()
	defer m.site.mu.Unlock()
	if m.host != nil {
		return m.host, nil
	}
	if m.site.lan == nil {
		return nil, fmt.Errorf("%s: %w", m.record.Name, ErrOff)
	}
	pid, err := m.PID()
	if err != nil {
		return nil, err
	}
	m.host, err = m.site.lan.Adopt(m.record.Name, fmt.Sprintf("/proc/%d/ns/net", pid))
	return m.host, err
}

// PowerOn starts the machine's supervisor, and nothing else yet. It does nothing if the machine
// is on.
func (m *Machine) PowerOn() error {
	if m.On() {
		return nil
	}
	if err := m.site.Up(); err != nil {
		return err
	}
	m.site.mu.Lock()
	defer m.site.mu.Unlock()
	if err := m.powerOn(); err != nil {
		return fmt.Errorf("switch on %s: %w", m.record.Name, err)
	}
	return nil
}

func (m *Machine) powerOn() (err error) {
	// A machine that ended by itself leaves its control group and cable.
	if err := m.powerOff(); err != nil {
		return err
	}
	if m.host, err = m.site.lan.Host(m.record.Name, m.record.Addrs...); err != nil {
		return err
	}
	for _, via := range m.record.Gateway {
		if err := m.host.Route(everywhere(via), via); err != nil {
			return err
		}
	}
	if err := m.writeNetworkFiles(); err != nil {
		return err
	}
	if err := cgroup.EnsureGroup(m.Cgroup()); err != nil {
		return err
	}
	groups, err := cgroup.Dirs(m.Cgroup())
	if err != nil {
		return err
	}
	spec := supervisor.Machine{
		Root: m.Disk("/"), Hostname: m.record.Name, Cgroups: groups,
		Program: m.site.record.Program, Supervisor: m.site.record.Supervisor, Tethered: m.site.record.Tethered,
	}
	ns, err := namespaces.OpenNetwork(m.host.Path())
	if err != nil {
		return err
	}
	defer ns.Close()
	const own = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC
	m.tether, err = m.site.spawn(supervisor.MachineName, spec, ns, own, nil)
	return err
}

func everywhere(via netip.Addr) netip.Prefix {
	if via.Is4() {
		return netip.MustParsePrefix("0.0.0.0/0")
	}
	return netip.MustParsePrefix("::/0")
}

// PowerOff ends the machine as pulling its plug does: every process at once, with mounts and
// network. The disk stays.
func (m *Machine) PowerOff() error {
	m.site.mu.Lock()
	defer m.site.mu.Unlock()
	return m.powerOff()
}

func (m *Machine) powerOff() error {
	if err := cgroup.Clear(m.Cgroup()); err != nil {
		return fmt.Errorf("switch off %s: %w", m.record.Name, err)
	}
	err := m.tether.close()
	if m.tether != nil {
		<-m.tether.ended // no child of this process is left to be reaped
		m.tether = nil
	}
	if m.host != nil {
		err = errors.Join(err, m.host.Close())
		m.host = nil
	}
	return err
}

// Reboot switches the machine off and on again.
func (m *Machine) Reboot() error {
	if err := m.PowerOff(); err != nil {
		return err
	}
	return m.PowerOn()
}

// Wipe switches the machine off and empties its disk. The result is a new machine with the
// same name and addresses.
func (m *Machine) Wipe() error {
	if err := m.PowerOff(); err != nil {
		return err
	}
	if err := removeTree(m.dir()); err != nil {
		return fmt.Errorf("wipe %s: %w", m.record.Name, err)
	}
	return m.seed()
}

// Remove switches the machine off and removes it from its site.
func (m *Machine) Remove() error {
	m.site.mu.Lock()
	defer m.site.mu.Unlock()
	if err := m.powerOff(); err != nil {
		return err
	}
	if err := removeTree(m.dir()); err != nil {
		return fmt.Errorf("remove %s: %w", m.record.Name, err)
	}
	return m.site.forget(m.record.Name)
}

// Pause freezes every process of the machine, containers too, as suspending a virtual machine
// does. Resume thaws them.
func (m *Machine) Pause() error { return cgroup.Freeze(m.Cgroup(), true) }

// Resume undoes Pause.
func (m *Machine) Resume() error { return cgroup.Freeze(m.Cgroup(), false) }

// Renumber gives the machine other addresses and gateways: at once if it is on, and for every
// later start.
func (m *Machine) Renumber(addrs []netip.Prefix, gateways ...netip.Addr) error {
	host, err := m.Host()
	if err != nil && !errors.Is(err, ErrOff) {
		return err
	}
	s := m.site
	s.mu.Lock()
	defer s.mu.Unlock()
	m.record.Addrs, m.record.Gateway = addrs, gateways
	for i := range s.record.Machines {
		if s.record.Machines[i].Name == m.record.Name {
			s.record.Machines[i] = m.record
		}
	}
	if err := errors.Join(s.save(), s.writeTargets()); err != nil {
		return err
	}
	if host == nil {
		return nil
	}
	if err := host.Renumber(addrs...); err != nil {
		return err
	}
	for _, via := range gateways {
		if err := host.Route(everywhere(via), via); err != nil {
			return err
		}
	}
	return m.writeNetworkFiles()
}

// Command prepares a program to be run on the machine by Start. The first argument is its name
// or path on the machine.
func (m *Machine) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, supervisor.SupervisorPath)
	cmd.Args = append([]string{supervisor.EnterName}, args...)
	cmd.Env, cmd.Dir, cmd.Err = Environment(), "/", nil
	return cmd
}

// Start starts a command made by Command on the machine: in its namespaces and its control
// group, as a child of this process. The caller waits for it.
func (m *Machine) Start(cmd *exec.Cmd) error {
	pid, err := m.PID()
	if err != nil {
		return err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return fmt.Errorf("enter %s: %w", m.record.Name, err)
	}
	defer unix.Close(fd)
	err = namespaces.OnOwnThread(func() error {
		// A thread can enter a mount namespace only if it shares its root folder with no
		// other thread.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return err
		}
		const all = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP
		if err := unix.Setns(fd, all); err != nil {
			return err
		}
		return cmd.Start()
	})
	if err != nil {
		return fmt.Errorf("run %s on %s: %w", strings.Join(cmd.Args[1:], " "), m.record.Name, err)
	}
	return nil
}

// Output runs a program on the machine and returns its output and standard error.
func (m *Machine) Output(ctx context.Context, args ...string) (string, error) {
	var out strings.Builder
	cmd := m.Command(ctx, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := m.Start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		err = fmt.Errorf("%s on %s: %w", strings.Join(args, " "), m.record.Name, err)
	}
	return out.String(), err
}

// StartKedge runs kedge with these arguments as a child of the supervisor, so that it outlives
// this process.
func (m *Machine) StartKedge(args ...string) error {
	_, err := m.request(supervisor.Request{Op: "start", Args: args, Env: Environment()})
	return err
}

// Kedge returns the state of the kedge that StartKedge has started.
func (m *Machine) Kedge() (supervisor.State, error) {
	return m.request(supervisor.Request{Op: "state"})
}

// SignalKedge sends a signal to kedge.
func (m *Machine) SignalKedge(sig unix.Signal) error {
	_, err := m.request(supervisor.Request{Op: "signal", Signal: int(sig)})
	return err
}

// Kill kills kedge alone; containers go on.
func (m *Machine) Kill() error {
	if err := m.SignalKedge(unix.SIGKILL); err != nil {
		return err
	}
	_, err := m.WaitKedge()
	return err
}

// WaitKedge waits until kedge has ended.
func (m *Machine) WaitKedge() (supervisor.State, error) {
	return m.request(supervisor.Request{Op: "wait"})
}

func (m *Machine) request(r supervisor.Request) (supervisor.State, error) {
	var st supervisor.State
	path, err := m.Live(supervisor.Socket)
	if err != nil {
		return st, err
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return st, fmt.Errorf("request to the supervisor of %s: %w", m.record.Name, err)
	}
	defer conn.Close()
	if r.Op != "wait" {
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	}
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return st, fmt.Errorf("request to the supervisor of %s: %w", m.record.Name, err)
	}
	if err := json.NewDecoder(conn).Decode(&st); err != nil {
		return st, fmt.Errorf("request to the supervisor of %s: %w", m.record.Name, err)
	}
	if st.Error != "" {
		return st, fmt.Errorf("%s: %s", m.record.Name, st.Error)
	}
	return st, nil
}

// seed makes the files on the machine's disk that every machine has.
func (m *Machine) seed() error {
	for _, dir := range []string{"etc", "home", "mnt", "opt/kedge", "root", "srv", "var/lib", "var/log", "var/tmp"} {
		if err := os.MkdirAll(m.Disk(dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Chmod(m.Disk("var/tmp"), 0o1777); err != nil {
		return err
	}
	if err := os.Symlink("/run", m.Disk("var/run")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := os.Symlink("kedge", m.Disk("opt/kedge/kubectl")); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	id, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		return err
	}
	files := map[string]string{
		"machine-id":    strings.ReplaceAll(string(id), "-", ""),
		"hostname":      m.record.Name + "\n",
		"passwd":        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"group":         "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
		"nsswitch.conf": "hosts: files dns\n",
		// There is no name server to ask: a site is not connected to the outside world.
		"resolv.conf": "# This machine has no name server.\n",
	}
	for name, text := range files {
		if err := os.WriteFile(m.Disk(filepath.Join("etc", name)), []byte(text), 0o644); err != nil {
			return err
		}
	}
	for _, name := range []string{"os-release", "localtime", "ld.so.cache", "protocols", "services"} {
		data, err := os.ReadFile(filepath.Join("/etc", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.WriteFile(m.Disk(filepath.Join("etc", name)), data, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writeNetworkFiles writes the files that depend on the addresses.
func (m *Machine) writeNetworkFiles() error {
	text := "127.0.0.1\tlocalhost\n::1\tlocalhost\n"
	for _, p := range m.record.Addrs {
		text += fmt.Sprintf("%s\t%s\n", p.Addr(), m.record.Name)
	}
	return os.WriteFile(m.Disk("etc/hosts"), []byte(text), 0o644)
}
