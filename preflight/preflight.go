package preflight

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Level is the severity of a finding.
type Level string

const (
	OK      Level = "ok"
	Warning Level = "warning" // kedge runs, but a feature is missing or will fail later
	Error   Level = "error"   // kedge cannot run
)

// Result is the finding of one check.
type Result struct {
	Check   string `json:"check"`
	Level   Level  `json:"level"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
}

// Port is a port that kedge will listen on.
type Port struct {
	Number   int
	Protocol string // "tcp" or "udp"
	Purpose  string // as in "API server"
}

// Config describes the node that will run on the machine.
type Config struct {
	DataDir   string
	RunDir    string
	NodeName  string // empty for the machine's host name
	NoNode    bool   // only the control plane runs, without pods and their network
	Running   int    // process of the node's own kedge, which uses its ports and routes; 0 for none
	Ports     []Port
	Ranges    []netip.Prefix // of pods and services
	PodRanges []netip.Prefix // of pods
	DNS       []netip.Addr   // of the cluster's resolver on this node
	OwnLinks  string         // prefix of the names of this node's own links to pods
	IPv6      bool           // pods get IPv6 addresses
	VXLAN     bool           // pods of different nodes connect over VXLAN
	// Snapshotter is the snapshotter of image layers: overlayfs, native, or empty for the
	// one that works. SnapshotterFile has the node's earlier choice.
	Snapshotter, SnapshotterFile string
	// Exists says that the node has run before: it runs on a full disk too.
	Exists bool

	BuildDate time.Time // a right clock shows no earlier time; zero if unknown
}

// DefaultConfig returns the configuration of a single node.
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

// Validate returns all mistakes in the configuration.
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

// check checks one property of the machine. It returns nothing when the property does not
// matter for this configuration.
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

// checks has the checks in the order of their output: a check comes after those that it depends
// on.
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

// withoutNode has the checks for a control plane without a node.
var withoutNode = []string{"data-directory", "run-directory", "disk-space", "memory", "open-files", "ports", "clock"}

// Run runs all checks and returns their results in a fixed order. When ctx is cancelled, it
// returns the results so far.
func Run(ctx context.Context, c Config) []Result { return run(ctx, c, realProbes()) }

func run(ctx context.Context, c Config, p probes) []Result {
	var results []Result
	for _, check := range checks() {
		if ctx.Err() != nil {
			break
		}
		if c.NoNode && !slices.Contains(withoutNode, check.name) {
			continue
		}
		for _, f := range check.run(ctx, c, p) {
			results = append(results, Result{check.name, f.level, f.message, f.remedy})
		}
	}
	return results
}

// Missing is the error of a machine that cannot run kedge.
type Missing struct {
	Results []Result // results of level Error
}

// Error lists the problems with their remedies, one a line.
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

// Required runs all checks. It returns a *Missing when kedge cannot run, and all results, so
// that the caller can log the warnings.
func Required(ctx context.Context, c Config) ([]Result, error) {
	results := Run(ctx, c)
	return results, verdict(results)
}

func verdict(results []Result) error {
	// Without privileges the other properties cannot be checked.
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
