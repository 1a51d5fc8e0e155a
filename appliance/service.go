package appliance

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"kedge/internal/errorkind"
)

// Service describes the service of a node once, for all service managers.
type Service struct {
	Name        string
	Description string
	Command     []string
	Environment string // file with variables; may be missing
	Log         string // file for the output, where the service manager keeps no log

	RestartDelay    time.Duration // the first delay, which grows to MaxRestartDelay
	MaxRestartDelay time.Duration
	// Permanent has the exit codes after which a restart cannot help. Code 2 is not among them: mistakes in the command line have
	// it, but crashes of Go programs too.
	Permanent []int
	// StopTimeout is longer than the time in which kedge stops by itself.
	StopTimeout time.Duration
	OpenFiles   int
	OOMScore    int
}

// newService returns the description of the service of a node.
func newService(command []string, environment string) Service {
	return Service{
		Name: serviceName, Description: "Kubernetes (kedge " + command[1] + ")",
		Command: command, Environment: environment, Log: "/var/log/" + serviceName + ".log",
		RestartDelay: 2 * time.Second, MaxRestartDelay: time.Minute, Permanent: []int{errorkind.ExitConfig},
		StopTimeout: 20 * time.Second, OpenFiles: 1 << 20, OOMScore: -999,
	}
}

// Systemd returns the unit of the service for a version of systemd.
//
// KillMode=process leaves the containers running when kedge stops, and Delegate=yes makes systemd leave their cgroups
// alone. kedge may wait for hours for a right clock or for a server to join, so the start has no time limit; kedge's own
// status shows what it waits for. No start limit: a machine that is without power or network for long must return by itself.
func (s Service) Systemd(version int) string {
	var out strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&out, format+"\n", args...) }
	line("# Written by \"kedge install\". Changes belong into a drop-in: systemctl edit %s", s.Name)
	line("[Unit]")
	line("Description=%s", s.Description)
	line("Wants=network-online.target")
	line("After=network-online.target")
	line("StartLimitIntervalSec=0")
	line("")
	line("[Service]")
	line("Type=notify")
	line("ExecStart=%s", strings.Join(quoted(s.Command, systemdWord), " "))
	line("EnvironmentFile=-%s", s.Environment)
	line("KillMode=process")
	line("Delegate=yes")
	line("Restart=always")
	line("RestartSec=%d", int(s.RestartDelay.Seconds()))
	if version >= 254 { // older versions warn about unknown keys
		line("RestartSteps=6")
		line("RestartMaxDelaySec=%d", int(s.MaxRestartDelay.Seconds()))
	}
	line("RestartPreventExitStatus=%s", strings.Trim(fmt.Sprint(s.Permanent), "[]"))
	line("TimeoutStartSec=infinity")
	line("TimeoutStopSec=%d", int(s.StopTimeout.Seconds()))
	line("LimitNOFILE=%d", s.OpenFiles)
	line("LimitNPROC=infinity")
	line("LimitCORE=infinity")
	line("TasksMax=infinity")
	line("OOMScoreAdjust=%d", s.OOMScore)
	line("")
	line("[Install]")
	line("WantedBy=multi-user.target")
	return out.String()
}

// OpenRC returns the init script of the service.
//
// supervise-daemon starts a program again whatever its exit code was. So kedge itself ends the supervision when a restart
// cannot help (lifecycle.EndSupervision): the service is then stopped, as it is failed with systemd. kedge rotates its log
// itself (--log): a rotation by another program would be missing on machines without it, and could lose lines.
func (s Service) OpenRC() string {
	var out strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&out, format+"\n", args...) }
	line("#!/sbin/openrc-run")
	line("# Written by \"kedge install\". Changes belong into /etc/conf.d/%s.", s.Name)
	line("")
	line("description=%s", shellWord(s.Description))
	line(": \"${log_file:=%s}\"", s.Log)
	line("supervisor=supervise-daemon")
	// OpenRC evaluates both as shell words.
	line("command=%s", shellWord(shellWord(s.Command[0])))
	line("command_args=\"%s --log \\\"${log_file}\\\"\"", escaped(strings.Join(quoted(s.Command[1:], shellWord), " ")))
	line("output_log=\"${log_file}\"")
	line("error_log=\"${log_file}\"")
	line("pidfile=\"/run/${RC_SVCNAME}.pid\"")
	line("respawn_delay=%d", int((s.RestartDelay + 3*time.Second).Seconds())) // it cannot grow
	line("respawn_max=0")
	line("retry=\"TERM/%d/KILL/5\"", int(s.StopTimeout.Seconds()))
	// One limit: some shells accept no more. The kubelet lowers its OOM score itself, where that is permitted;
	// supervise-daemon would not start a service without the permission.
	line("rc_ulimit=\"-n %d\"", s.OpenFiles)
	line("")
	line("depend() {")
	// Distributions have different names for these: Debian has no localmount. What a machine does not have is not waited for.
	line("\tuse net localmount mountall")
	line("\twant cgroups") // kedge names what is missing
	line("\tafter firewall")
	line("}")
	line("")
	line("start_pre() {")
	line("\tif [ -f %s ]; then", shellWord(s.Environment))
	line("\t\tset -a")
	line("\t\t. %s", shellWord(s.Environment))
	line("\t\tset +a")
	line("\tfi")
	line("}")
	return out.String()
}

// OpenRCSettings returns the file for the user's changes of the service, which is written once.
func (s Service) OpenRCSettings() string {
	return fmt.Sprintf("# Settings of the service %s. \"kedge install\" writes this file once and never changes it.\n"+
		"# kedge's own settings are in the folder of %s.\n\n"+
		"# The log, which kedge rotates itself.\n#log_file=%q\n\n"+
		"# Variables for the service.\n#export GOMEMLIMIT=500MiB\n", s.Name, filepath.Dir(s.Environment), s.Log)
}

func quoted(words []string, quote func(string) string) (out []string) {
	for _, w := range words {
		out = append(out, quote(w))
	}
	return out
}

// plain has the characters that need no quotes in shells and in units.
const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=./:@,+"

func isPlain(word string) bool { return word != "" && strings.Trim(word, plain) == "" }

// shellWord quotes a word for a shell.
func shellWord(word string) string {
	if isPlain(word) {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}

// systemdWord quotes a word for ExecStart.
func systemdWord(word string) string {
	word = strings.ReplaceAll(strings.ReplaceAll(word, "%", "%%"), "$", "$$")
	if isPlain(word) {
		return word
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(word) + `"`
}

// escaped escapes a text for double quotes of a shell, and for values in EnvironmentFile.
func escaped(text string) string {
	return strings.NewReplacer(`\`, `\\`, `"`, `\"`, "$", `\$`, "`", "\\`").Replace(text)
}
