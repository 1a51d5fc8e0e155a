package preflight

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Level is how much a finding matters.
type Level string

const (
	OK      Level = "ok"
	Warning Level = "warning" // kedge runs, but something will be missing or go wrong later
	Error   Level = "error"   // kedge cannot run
)

// Result is the finding of one check.
type Result struct {
	Check   string `json:"check"`
	Level   Level  `json:"level"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
}

// Port is one that kedge will listen on.
type Port struct {
	Number   int
	Protocol string // "tcp" or "udp"
	Purpose  string // as in "API server"
}

// Config says what the machine is wanted for.
type Config struct {
	DataDir  string
	RunDir   string
	NodeName string // empty for the machine's host name
	Ports    []Port
	Ranges   []netip.Prefix // of pods and services
	OwnLinks string         // how the names of this node's own links to pods begin
	IPv6     bool           // pods get IPv6 addresses
	VXLAN    bool           // pods of different nodes meet over VXLAN
	// Snapshotter is how layers of images are to be stacked: overlayfs, native, or empty
	// for what works. What a node without a wish has chosen before is in SnapshotterFile.
	Snapshotter, SnapshotterFile string

	BuildDate time.Time // no right clock shows an earlier time; zero when not known
}

// DefaultConfig returns what a node needs that is alone.
func DefaultConfig() Config {
	return Config{
		DataDir: "/var/lib/kedge",
		RunDir:  "/run/kedge",
		VXLAN:   true,
		Ports: []Port{
			{6443, "tcp", "API server"},
			{10250, "tcp", "kubelet"},
		},
	}
}

// Validate reports what makes a configuration unusable.
func (c Config) Validate() error {
	var errs []error
	if c.DataDir == "" || c.RunDir == "" {
		errs = append(errs, errors.New("data and run directory must be given"))
	}
	for _, p := range c.Ports {
		if p.Number < 1 || p.Number > 65535 || p.Protocol != "tcp" && p.Protocol != "udp" {
			errs = append(errs, fmt.Errorf("port %d/%s for the %s does not exist", p.Number, p.Protocol, p.Purpose))
		}
	}
	return errors.Join(errs...)
}

// check looks at one thing. It returns nothing when the thing does not concern
// this configuration.
type check struct {
	name string
	run  func(ctx context.Context, c Config, p probes) []finding
}

// finding is a Result without its check.
type finding struct {
	level           Level
	message, remedy string
}

func fine(format string, args ...any) []finding {
	return []finding{{OK, fmt.Sprintf(format, args...), ""}}
}

func warn(message, remedy string) []finding { return []finding{{Warning, message, remedy}} }
func fail(message, remedy string) []finding { return []finding{{Error, message, remedy}} }

const privileges = "privileges"

// checks in the order in which a reader wants them: what must be right for the
// next ones to mean anything comes first.
func checks() []check {
	return []check{
		{privileges, checkPrivileges},
		{"namespaces", checkNamespaces},
		{"cgroups", checkCgroups},
		{"seccomp", checkSeccomp},
		{"apparmor", checkAppArmor},
		{"kernel-log", checkKernelLog},
		{"kernel-parameters", checkKernelParameters},
		{"data-directory", checkDataDir},
		{"run-directory", checkRunDir},
		{"overlayfs", checkOverlay},
		{"disk-space", checkDiskSpace},
		{"memory", checkMemory},
		{"swap", checkSwap},
		{"open-files", checkOpenFiles},
		{"inotify", checkInotify},
		{"links", checkLinks},
		{"nftables", checkNftables},
		{"connection-tracking", checkConntrack},
		{"firewall", checkFirewall},
		{"default-route", checkDefaultRoute},
		{"ranges", checkRanges},
		{"ports", checkPorts},
		{"hosts-file", checkHostsFile},
		{"users-file", checkUsersFile},
		{"node-name", checkNodeName},
		{"clock", checkClock},
	}
}

// Run does all checks and returns their results, in a fixed order. It stops
// early, with what it has, when ctx is cancelled.
func Run(ctx context.Context, c Config) []Result { return run(ctx, c, realProbes()) }

func run(ctx context.Context, c Config, p probes) []Result {
	var results []Result
	for _, check := range checks() {
		if ctx.Err() != nil {
			break
		}
		for _, f := range check.run(ctx, c, p) {
			results = append(results, Result{check.name, f.level, f.message, f.remedy})
		}
	}
	return results
}

// Missing is the error of a machine on which kedge cannot run.
type Missing struct {
	Results []Result // those of level Error
}

// Error lists what is missing, one line each with the remedy.
func (m *Missing) Error() string {
	text := "this machine cannot run kedge"
	for _, r := range m.Results {
		text += fmt.Sprintf("\n  %s: %s", r.Check, r.Message)
		if r.Remedy != "" {
			text += "; " + r.Remedy
		}
	}
	return text
}

// Required does all checks and returns a *Missing when kedge cannot run, along
// with all results, so that the caller may log the warnings.
func Required(ctx context.Context, c Config) ([]Result, error) {
	results := Run(ctx, c)
	return results, verdict(results)
}

func verdict(results []Result) error {
	// Without privileges the rest is not missing, it cannot be tried.
	for _, r := range results {
		if r.Check == privileges && r.Level == Error {
			return &Missing{Results: []Result{r}}
		}
	}
	missing := slices.DeleteFunc(slices.Clone(results), func(r Result) bool { return r.Level != Error })
	if len(missing) == 0 {
		return nil
	}
	return &Missing{Results: missing}
}
