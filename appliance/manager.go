package appliance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// serviceName is the name of kedge's service.
const serviceName = "kedge"

// Manager is the machine's service manager.
type Manager interface {
	// Name is "systemd" or "OpenRC", or empty if the machine has neither.
	Name() string
	// Files returns the files of a service.
	Files(Service) []File
	// State returns the state of kedge's service.
	State(ctx context.Context) (ServiceState, error)
	// Reload makes the manager read changed files.
	Reload(ctx context.Context) error
	// Enable makes the service start at boot.
	Enable(ctx context.Context) error
	Disable(ctx context.Context) error
	// Restart starts or restarts the service, and does not wait until kedge is ready.
	Restart(ctx context.Context) error
	// Stop stops the service and waits for its end.
	Stop(ctx context.Context) error
	// LastWords returns the error with which the service has ended, as far as it is known.
	LastWords(ctx context.Context) string
	// LogCommand is the command that shows the service's log.
	LogCommand() string
}

// ServiceState is the state of a service.
type ServiceState struct {
	Enabled bool // it starts at boot
	Active  bool // it runs, starts, or is waiting to be started again
	Failed  bool // it has ended and is not started again
	Code    int  // exit code of a service that has failed; 0 if unknown
}

// FindManager returns the machine's service manager.
func FindManager() Manager {
	if executable("/sbin/openrc-run") || executable("/usr/sbin/openrc-run") {
		return openRC{root: "/"}
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		if path, err := exec.LookPath("systemctl"); err == nil {
			return systemd{systemctl: path}
		}
	}
	return noManager{}
}

func executable(path string) bool { return unix.Access(path, unix.X_OK) == nil }

// command runs a program of the service manager. Its output is in the error.
func command(ctx context.Context, limit time.Duration, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %s", limit))
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if err != nil {
		text := strings.TrimSpace(errOut.String())
		if cause := context.Cause(ctx); cause != nil {
			text = cause.Error()
		}
		err = fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, text)
	}
	return out.Bytes(), err
}

// Time limits of programs of service managers.
const (
	quickLimit = 30 * time.Second
	stopLimit  = 90 * time.Second
)

// systemd is the service manager of most distributions.
type systemd struct{ systemctl string }

func (s systemd) Name() string { return "systemd" }

func (s systemd) Files(service Service) []File {
	return []File{{Path: "/etc/systemd/system/" + service.Name + ".service", Data: []byte(service.Systemd(s.version())), Mode: 0o644, Restarts: true,
		What: "a unit", Remedy: "keep changes in a drop-in (systemctl edit " + service.Name + ")"}}
}

// version returns systemd's version, or 0.
func (s systemd) version() int {
	out, err := command(context.Background(), quickLimit, s.systemctl, "--version")
	fields := strings.Fields(string(out))
	if err != nil || len(fields) < 2 {
		return 0
	}
	v, _ := strconv.Atoi(strings.SplitN(fields[1], ".", 2)[0])
	return v
}

func (s systemd) State(ctx context.Context) (ServiceState, error) {
	out, err := command(ctx, quickLimit, s.systemctl, "show", serviceName+".service", "--property=ActiveState,UnitFileState,ExecMainStatus")
	if err != nil {
		return ServiceState{}, err
	}
	return systemdState(string(out)), nil
}

func systemdState(text string) (state ServiceState) {
	for line := range strings.Lines(text) {
		switch name, value, _ := strings.Cut(strings.TrimSpace(line), "="); name {
		case "ActiveState":
			state.Active = value == "active" || value == "activating" || value == "reloading"
			state.Failed = value == "failed"
		case "UnitFileState":
			state.Enabled = value == "enabled"
		case "ExecMainStatus":
			state.Code, _ = strconv.Atoi(value)
		}
	}
	return state
}

func (s systemd) Reload(ctx context.Context) error {
	_, err := command(ctx, quickLimit, s.systemctl, "daemon-reload")
	return err
}

func (s systemd) Enable(ctx context.Context) error {
	_, err := command(ctx, quickLimit, s.systemctl, "enable", "--quiet", serviceName)
	return err
}

func (s systemd) Disable(ctx context.Context) error {
	_, err := command(ctx, quickLimit, s.systemctl, "disable", "--quiet", serviceName)
	return err
}

func (s systemd) Restart(ctx context.Context) error {
	// The number of starts within a time is limited no more, and a failed service is forgotten.
	_, _ = command(ctx, quickLimit, s.systemctl, "reset-failed", "--quiet", serviceName)
	_, err := command(ctx, quickLimit, s.systemctl, "restart", "--no-block", serviceName)
	return err
}

func (s systemd) Stop(ctx context.Context) error {
	_, err := command(ctx, stopLimit, s.systemctl, "stop", serviceName)
	if state, none := s.State(ctx); err != nil && none == nil && !state.Active {
		err = nil // there is no such service
	}
	_, _ = command(ctx, quickLimit, s.systemctl, "reset-failed", "--quiet", serviceName)
	return err
}

func (s systemd) LastWords(ctx context.Context) string {
	// The exit code is not 0 for a service that does not run.
	out, _ := command(ctx, quickLimit, s.systemctl, "status", "--no-pager", "--full", "--lines=40", "--output=cat", serviceName)
	return lastError(string(out))
}

func (s systemd) LogCommand() string { return "journalctl -u " + serviceName }

// lastError returns kedge's last error in the lines of a log, with the lines that continue it.
func lastError(log string) string {
	const mark = "kedge: "
	i := strings.LastIndex("\n"+log, "\n"+mark)
	if i < 0 {
		return ""
	}
	var out []string
	for line := range strings.Lines(log[i+len(mark):]) {
		line = strings.TrimRight(line, "\n")
		if len(out) > 0 && (!strings.HasPrefix(line, " ") || strings.TrimSpace(line) == "") {
			break
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

// openRC is the service manager of Alpine.
type openRC struct{ root string }

func (o openRC) Name() string { return "OpenRC" }

func (o openRC) Files(service Service) []File {
	return []File{
		{Path: "/etc/init.d/" + service.Name, Data: []byte(service.OpenRC()), Mode: 0o755, Restarts: true, What: "an init script", Remedy: "keep changes in /etc/conf.d/" + service.Name},
		{Path: "/etc/conf.d/" + service.Name, Data: []byte(service.OpenRCSettings()), Mode: 0o644, Once: true},
	}
}

func (o openRC) State(ctx context.Context) (ServiceState, error) {
	var state ServiceState
	_, err := os.Lstat(filepath.Join(o.root, "etc/runlevels/default", serviceName))
	state.Enabled = err == nil
	if _, err := os.Stat(filepath.Join(o.root, "etc/init.d", serviceName)); errors.Is(err, fs.ErrNotExist) {
		return state, nil
	}
	_, err = command(ctx, quickLimit, "rc-service", serviceName, "status")
	var exit *exec.ExitError
	switch {
	case err == nil:
		state.Active = true
	case !errors.As(err, &exit):
		return state, err
	default: // 3 is stopped, 8 starting; the others have an error
		state.Active = exit.ExitCode() == 8
		state.Failed = !state.Active
	}
	return state, nil
}

func (o openRC) Reload(context.Context) error { return nil } // it reads its files at every start

func (o openRC) Enable(ctx context.Context) error {
	_, err := command(ctx, quickLimit, "rc-update", "add", serviceName, "default")
	return err
}

func (o openRC) Disable(ctx context.Context) error {
	_, err := command(ctx, quickLimit, "rc-update", "delete", serviceName, "default")
	if state, none := o.State(ctx); none == nil && !state.Enabled {
		err = nil // it was not enabled
	}
	return err
}

func (o openRC) Restart(ctx context.Context) error {
	_, err := command(ctx, stopLimit, "rc-service", serviceName, "restart")
	return err
}

func (o openRC) Stop(ctx context.Context) error {
	_, err := command(ctx, stopLimit, "rc-service", "--ifexists", serviceName, "stop")
	if state, none := o.State(ctx); err != nil && none == nil && !state.Active {
		err = nil
	}
	return err
}

func (o openRC) log() string { return newService([]string{"", ""}, "").Log }

func (o openRC) LastWords(context.Context) string {
	f, err := os.Open(filepath.Join(o.root, o.log()))
	if err != nil {
		return ""
	}
	defer f.Close()
	const tail = 16 << 10
	buf := make([]byte, tail)
	if st, err := f.Stat(); err == nil {
		n, _ := f.ReadAt(buf, max(0, st.Size()-tail))
		return lastError(string(buf[:n]))
	}
	return ""
}

func (o openRC) LogCommand() string { return "tail " + o.log() }

// noManager stands for all other ways to start services.
type noManager struct{}

func (noManager) Name() string                                { return "" }
func (noManager) Files(Service) []File                        { return nil }
func (noManager) State(context.Context) (ServiceState, error) { return ServiceState{}, nil }
func (noManager) Reload(context.Context) error                { return nil }
func (noManager) Enable(context.Context) error                { return nil }
func (noManager) Disable(context.Context) error               { return nil }
func (noManager) Restart(context.Context) error               { return nil }
func (noManager) Stop(context.Context) error                  { return nil }
func (noManager) LastWords(context.Context) string            { return "" }
func (noManager) LogCommand() string                          { return "" }
